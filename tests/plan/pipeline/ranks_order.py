"""Run on every gloo rank: passes of a model in several pipelines, and the order in which megatron-core ran its passes.

Started by test_real_order.py with a folder that holds job.json; writes one file a rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


def main(folder: Path) -> None:
    from megatron_r1.config.run import RunConfig
    from megatron_r1.config.schema import convert
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    platform, found = select("cpu"), {}
    for name, job in json.loads((folder / "job.json").read_text()).items():
        config = convert(RunConfig, job["config"])
        os.environ["MASTER_PORT"] = str(job["port"])
        with process_groups(platform, config.parallel, seed=0, threads=1):
            found[name] = order_of_passes(config, platform, job["micro_batches"])
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def order_of_passes(config: Any, platform: Any, micro_batches: int) -> dict[str, Any]:
    """The pipeline rank, and (kind, micro-batch, chunk) of its passes in the order in which it ran them."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_r1.model.build import build_model
    from megatron_r1.model.forward_backward import forward_backward
    from megatron_r1.parallel.mesh import pipeline_stage
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward

    length = config.train.sequence_length
    model = build_model(config.model, config.parallel, platform, 0, config.performance)
    wrapped = Optimizer(model, config.train, config.performance).chunks
    rows = torch.randint(5, config.model.vocab_size, (micro_batches, length + 1))
    rows[:, 0] = torch.arange(micro_batches)
    recorder = Recorder(schedules.forward_step, schedules.backward_step)
    with (
        patch.object(schedules, "forward_step", recorder.forward_step),
        patch.object(schedules, "backward_step", recorder.backward_step),
    ):
        forward_backward(model, wrapped, rows.split(1), recorder.forward(next_token_forward), length)
    return {"rank": pipeline_stage(), "order": recorder.order}


class Recorder:
    """Notes which micro-batch goes through which chunk, and lets megatron-core's own functions run it."""

    def __init__(self, forward_step: Any, backward_step: Any) -> None:
        self.order: list[tuple[str, int, int]] = []
        self._forward_step, self._backward_step = forward_step, backward_step
        self._micro_batch = -1
        self._outputs: list[tuple[Any, int, int]] = []

    def forward(self, forward: Any) -> Any:
        """The same forward; a micro-batch is known by its first token."""

        def noted(model: Any, tokens_BL: torch.Tensor) -> Any:
            self._micro_batch = int(tokens_BL[0, 0])
            return forward(model, tokens_BL)

        return noted

    def forward_step(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> Any:
        result = self._forward_step(*args, vp_stage=vp_stage, **kwargs)
        chunk = vp_stage or 0
        self.order.append(("forward", self._micro_batch, chunk))
        self._outputs.append((tensor_of(result[0]), self._micro_batch, chunk))
        return result

    def backward_step(self, input_tensor: Any, output_tensor: Any, *args: Any) -> Any:
        [(_, micro_batch, chunk)] = [entry for entry in self._outputs if entry[0] is tensor_of(output_tensor)]
        self.order.append(("backward", micro_batch, chunk))
        return self._backward_step(input_tensor, output_tensor, *args)


def tensor_of(output: Any) -> Any:
    return output[0] if isinstance(output, list) else output


if __name__ == "__main__":
    main(Path(sys.argv[1]))
