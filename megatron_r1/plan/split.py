"""Reinforcement learning on a cluster: which nodes or GPUs train, and which run the servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.run import RunConfig
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.decode import ServerGpus, engines_of, with_engines
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.rollout import RolloutStep, rl_step
from megatron_r1.plan.search import Found, search

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the nodes, or of one node's GPUs, that run servers, of which each is tried."""


@dataclass(frozen=True, slots=True)
class Split:
    """A division of the GPUs, with the trainer's layouts on its share."""

    trainer: Found
    engines: ServerGpus
    step: RolloutStep
    engine_nodes: int
    """Nodes that run servers alone; 0 where servers are on the trainer's nodes."""
    engine_gpus: int
    """GPUs that run servers alone, of these nodes or of the one node; 0 where servers share those of
    the trainer's first node."""


def splits(config: RunConfig, gpus: int, constants: Constants, fixed: Fixed) -> tuple[list[Split], list[Found]]:
    """All divisions of a number of GPUs that fit, best first; and the searches of trainers that found nothing."""
    found, nothing = [], []
    gpu = GPUS[config.plan.gpu]
    for engine_gpus in _engine_gpus(config, gpus):
        # Servers that share the trainer's GPUs are rank 0's, on its node.
        engines = engines_of(config, gpu, engine_gpus or min(gpus, gpu.per_node))
        sized = with_engines(config, engines)
        trainer = search(sized, "grpo", gpus - engine_gpus, constants, fixed)
        if not trainer.best_first:
            nothing.append(trainer)
            continue
        step = rl_step(trainer.best_first[0].job, engines, constants)
        engine_nodes = engine_gpus // gpu.per_node if gpus > gpu.per_node else 0
        found.append(Split(trainer, engines, step, engine_nodes, engine_gpus))
    return sorted(found, key=lambda split: split.step.total), nothing


def _engine_gpus(config: RunConfig, gpus: int) -> Iterator[int]:
    """GPUs of servers to try: of whole nodes, or of the one node. Only a single GPU is shared by both."""
    per_node = GPUS[config.plan.gpu].per_node
    if config.rollout.placement == "colocated" or gpus == 1:
        yield 0
    elif (nodes := gpus // per_node) > 1:
        yield from sorted({per_node * max(1, min(nodes - 1, round(share * nodes))) for share in SHARES})
    else:
        yield from sorted({max(1, int(share * gpus)) for share in SHARES})
