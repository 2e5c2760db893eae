"""Pre-training on two ranks, of which rank 1 works several times as long from a step on.

torchrun ... slow_rank.py FOLDER STEP writes the run FOLDER/run, for tests/train/test_rank_times.py.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import torch

from megatron_r1.__main__ import exit_code
from megatron_r1.parallel.phases import current
from megatron_r1.platform.launcher import rank
from megatron_r1.train.stream import StreamReader

SETTINGS = (
    "name=run", "platform=cpu", "threads=1", "track=off", "data.num_documents=300", "model.num_layers=2",
    "train.steps=12", "train.schedule.warmup_steps=0", "train.sequence_length=32", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.log_interval=2", "profile.steps=1:2", "profile.ranks=[1]",
)  # fmt: skip
PRODUCTS = 50
"""Of matrices of 512 x 512 in each forward pass; many times the work of the pass, also on a busy machine."""


def main(folder: str, slow_from: int) -> None:
    forward = StreamReader.forward

    def slower(self: Any, model: Any, micro_batch: Any) -> Any:
        if rank() == 1 and current().step >= slow_from:
            square = torch.ones(512, 512)
            for _ in range(PRODUCTS):
                square @ square
        return forward(self, model, micro_batch)

    StreamReader.forward = slower  # type: ignore[method-assign]
    sys.exit(exit_code(["pretrain", f"root={folder}", *SETTINGS]))


if __name__ == "__main__":
    signal.alarm(150)  # whatever happens to the launcher, no rank waits for ever
    main(sys.argv[1], int(sys.argv[2]))
