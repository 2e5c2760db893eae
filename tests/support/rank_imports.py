"""What ranks on CPUs import, for the process that forked_ranks.py forks them from. No other process imports this."""

from __future__ import annotations

import gc
from importlib import import_module

from megatron_r1.platform import select

MODULES = (
    "megatron_r1.rl.learner",
    "megatron_r1.rl.loop",
    "megatron_r1.runs.post_training",
    "megatron_r1.runs.training_run",
    "megatron_r1.train.optimizer",
    "tests.support.float64",
    "torch._dynamo",  # which torch's optimizers import when the first is built
)

select("cpu")  # before megatron.core
for name in MODULES:
    import_module(name)
gc.collect()
gc.freeze()  # a rank's own collections then leave alone, and do not copy, what it shares with its parent
