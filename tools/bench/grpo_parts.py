"""One whole GRPO step beside the sum of its parts, on this machine's CPU.

    python tools/bench/grpo_parts.py --threads 1

The parts are what nobody can leave out: the engine's decoding, the model's forward passes, those that train with the
log-probs' backward pass, and the optimizer's steps; the in-process engine needs no sync. They are recorded in the whole
step just before and done again with nothing between them: no scoring, no journal, no batches, advantages or metrics.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from megatron_r1.platform import select

PLATFORM = select("cpu")

import torch  # noqa: E402

from megatron_r1.parallel.mesh import process_groups  # noqa: E402
from tools.bench.comparison import alternate, describe, seconds_of  # noqa: E402
from tools.bench.grpo_step import LEARNING_RATE, OurSide, add_arguments, task_of  # noqa: E402


class Recorder:
    """What the last whole step asked of engine and model."""

    def __init__(self, side: OurSide, updates: int):
        self._side, self._updates, self._recording = side, updates, False
        self._passes: list[tuple[Any, Any, bool]] = []
        self._requests: tuple[Any, ...] = ()
        self._generate = side.engine.generate
        side.engine.generate = self._note_requests  # type: ignore[method-assign]
        side.model.register_forward_pre_hook(self._note_pass, with_kwargs=True)

    def _note_requests(self, requests: Any, sampling: Any) -> Any:
        self._requests = requests, sampling
        return self._generate(requests, sampling)

    def _note_pass(self, _: Any, args: Any, kwargs: Any) -> None:
        if self._recording:
            self._passes.append((args, kwargs, torch.is_grad_enabled()))

    def whole_step(self) -> None:
        self._passes, self._recording = [], True
        self._side.step()
        self._recording = False

    def parts(self) -> None:
        """The engine, the passes and the optimizer's steps."""
        model, optimizer = self._side.model, self._side.optimizer
        self._generate(*self._requests)
        for args, kwargs, trains in self._passes:
            if not trains:
                with torch.no_grad():
                    model(*args, **kwargs)
        training = [(args, kwargs) for args, kwargs, trains in self._passes if trains]
        share = len(training) // self._updates
        for first in range(0, len(training), share):
            optimizer.zero_gradients()
            for args, kwargs in training[first : first + share]:
                model(*args, **kwargs).log_probs.mean().backward()
            optimizer.step(LEARNING_RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = task_of(given, Path(folder))
        with process_groups(PLATFORM, task.config.parallel, seed=0, threads=given.threads[0]):
            recorder = Recorder(OurSide(task), given.updates)
            recorder.whole_step()
            ways = {"whole step": seconds_of(recorder.whole_step), "parts": seconds_of(recorder.parts)}
            found = alternate(ways, given.rounds)
    print(describe(found, base="parts", work=task.responses, unit="responses"))


if __name__ == "__main__":
    main()
