"""How many bytes a weight sync would send if it sent only what changed: `tools/bench/sync_delta.py BASE [KEY=VALUE]`.

Trains 60 steps of GRPO from the run BASE in this process, and compares at every step what a sync sends with what it
sent one step before. Three kinds of numbers:

    fp32    the weights as they are trained
    bf16    what a trainer with fp32 master weights sends
    bf16 R1 the same for weights as small as those of R1, whose standard deviation at the start is smaller by the root
            of the widths' ratio: with Adam an update is as large as the learning rate, however small the weight is

Rows of the table, each a share of the dense sync: the median over the steps, the least and the most. A tensor that is
smaller dense is counted dense. R1's own settings: `train.schedule.learning_rate=3e-6 rl.updates_per_rollout=16`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.commands.grpo import build_hooks, build_learner, rollout_source
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.build import native_tensors
from megatron_r1.model.names import in_multi_token_layer
from megatron_r1.model.replay import NoReplay
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rl.generation.reward_service import NoRewardModels
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rollout.in_process import LocalEngine
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.runs.initial_weights import InitialModel, initial_model
from megatron_r1.runs.prompts import prompt_formatter
from megatron_r1.runs.training_run import TrainingRun, training_run
from megatron_r1.train.loop import train

R1_WIDTH = 7168
LARGEST_GAP = (1 << 16) - 1


def dense(changed: Tensor, element: int) -> int:
    """Bytes of a whole tensor, at `element` bytes a number."""
    return changed.numel() * element


def tensors(changed: Tensor, element: int) -> int:
    """The whole tensor if any of it changed."""
    return dense(changed, element) if changed.any() else 0


def rows(changed: Tensor, element: int) -> int:
    """The rows that changed, each with an index of four bytes."""
    rows_RN = changed.reshape(len(changed), -1)
    return int(rows_RN.any(1).sum()) * (4 + rows_RN.shape[1] * element)


def indexed(changed: Tensor, element: int) -> int:
    """The numbers that changed, each with an index of four bytes."""
    return int(changed.sum()) * (4 + element)


def gaps(changed: Tensor, element: int) -> int:
    """The numbers that changed, each with its distance from the one before in two bytes; longer ways take stops."""
    positions = changed.flatten().nonzero()[:, 0]
    between = positions.diff(prepend=torch.tensor([-1])) - 1
    stops = int((between // LARGEST_GAP).sum())
    return (len(positions) + stops) * (2 + element)


def masked(changed: Tensor, element: int) -> int:
    """A bit for every number, and the numbers that changed."""
    return math.ceil(changed.numel() / 8) + int(changed.sum()) * element if changed.any() else 0


FORMS: dict[str, Callable[[Tensor, int], int]] = {
    "tensors that changed": tensors,
    "rows that changed": rows,
    "numbers, 4-byte indices": indexed,
    "numbers, 2-byte gaps": gaps,
    "numbers, a bit mask": masked,
}
NUMBERS = {"fp32": 4, "bf16": 2, "bf16 R1": 2}
"""Kind of numbers -> bytes of each."""


class CountingEngine(LocalEngine):
    """The local engine, which counts at every push what a sync would send."""

    def __init__(self, run: TrainingRun):
        super().__init__(run.model, run.config.rollout.local_batch_size, run.tokenizer.pad)
        self._payload, self._trained = WeightPayload(run.config.model), run.model
        self._scale = math.sqrt(R1_WIDTH / run.config.model.hidden_size)
        self._before: dict[str, Tensor] = {}
        self.shares: list[dict[tuple[str, str], float]] = []
        """By step: (form, kind of numbers) -> share of the dense bytes."""
        self.changed: list[dict[str, float]] = []
        """By step: kind of numbers -> share of the numbers that changed."""

    def push(self, version: str) -> None:
        super().push(version)
        sent = self._payload.tensors(native_tensors(self._trained), complete=True)
        now = {one.name: one.tensor.detach().float().clone() for one in sent}
        if self._before:
            self._count(now)
        self._before = now

    def _count(self, now: dict[str, Tensor]) -> None:
        shares: dict[tuple[str, str], float] = {}
        changed_numbers: dict[str, float] = {}
        for kind, element in NUMBERS.items():
            masks = [self._changed(kind, self._before[name], now[name]) for name in now]
            whole = sum(dense(mask, element) for mask in masks)
            for form, size in FORMS.items():
                shares[form, kind] = sum(min(size(mask, element), dense(mask, element)) for mask in masks) / whole
            changed_numbers[kind] = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        self.shares.append(shares)
        self.changed.append(changed_numbers)

    def _changed(self, kind: str, before: Tensor, now: Tensor) -> Tensor:
        if kind == "fp32":
            return before != now
        if kind == "bf16 R1":
            now = before + (now - before) * self._scale
        return before.bfloat16() != now.bfloat16()


@contextmanager
def training(config: RunConfig, initial: InitialModel, tokenizer: Tokenizer) -> Iterator[TrainingRun]:
    """The run that `megatron-r1 grpo` would train."""
    with training_run(config, tokenizer, initial, trainable=lambda name: not in_multi_token_layer(name)) as run:
        yield run


def measure(config: RunConfig) -> CountingEngine:
    """Train, and count at every step."""
    initial, tokenizer = initial_model(config)
    formatter = prompt_formatter(config, tokenizer)
    scorer = build_rubric(config.reward, lambda text: len(tokenizer.encode(text)), [])
    with training(config, initial, tokenizer) as run:
        learner, engine, service = build_learner(run, initial, NoReplay()), CountingEngine(run), NoRewardModels()
        with rollout_source(run, engine, {}, formatter, scorer, service) as rollouts:
            step = reinforcement_step(rollouts, learner, engine.push, config.rl.prompts_per_rollout)
            state = train(run.state, step, build_hooks(run, learner), config.train.steps)
        engine.push(str(state.step))
    return engine


def report(engine: CountingEngine, model: ModelConfig) -> Iterator[str]:
    """The table."""
    yield f"{len(engine.shares)} syncs, model {model.hidden_size} wide; shares of the dense bytes: median (least-most)"
    yield f"{'':<26}" + "".join(f"{kind:>24}" for kind in NUMBERS)

    def line(title: str, values: dict[str, list[float]]) -> str:
        cells = [f"{statistics.median(found):.3f} ({min(found):.3f}-{max(found):.3f})" for found in values.values()]
        return f"{title:<26}" + "".join(f"{cell:>24}" for cell in cells)

    for form in FORMS:
        yield line(form, {kind: [step[form, kind] for step in engine.shares] for kind in NUMBERS})
    yield line("share of numbers changed", {kind: [step[kind] for step in engine.changed] for kind in NUMBERS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a run of `megatron-r1 pretrain`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of `megatron-r1 grpo`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        fixed = [f"init.from='{given.base}'", f"root='{root}'", "name=delta", "track=off", "rollout=local", "threads=1"]
        config = load("grpo", [*fixed, "platform=cpu", "train.save_interval=1000", *given.overrides])
        engine = measure(config)
    print(*report(engine, config.model), sep="\n")


if __name__ == "__main__":
    main()
