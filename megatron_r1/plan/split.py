"""Reinforcement learning on a cluster: which nodes train, and which run the servers."""

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
"""Shares of the nodes that run servers, of which each is tried."""


@dataclass(frozen=True, slots=True)
class Split:
    """A division of the nodes, with the trainer's layouts on its share."""

    trainer: Found
    engines: ServerGpus
    step: RolloutStep
    engine_nodes: int
    """0 where servers share the trainer's GPUs."""


def splits(config: RunConfig, gpus: int, constants: Constants, fixed: Fixed) -> tuple[list[Split], list[Found]]:
    """All divisions of a number of GPUs that fit, best first; and the searches of trainers that found nothing."""
    found, nothing = [], []
    gpu = GPUS[config.plan.gpu]
    for engine_nodes in _engine_nodes(config, gpus):
        engines = engines_of(config, gpu, engine_nodes * gpu.per_node or gpus)
        sized = with_engines(config, engines)
        trainer = search(sized, "grpo", gpus - engine_nodes * gpu.per_node, constants, fixed)
        if not trainer.best_first:
            nothing.append(trainer)
            continue
        step = rl_step(trainer.best_first[0].job, engines, constants)
        found.append(Split(trainer, engines, step, engine_nodes))
    return sorted(found, key=lambda split: split.step.total), nothing


def _engine_nodes(config: RunConfig, gpus: int) -> Iterator[int]:
    """Nodes of servers to try; servers that share the trainer's GPUs have none of their own."""
    nodes = gpus // GPUS[config.plan.gpu].per_node
    if config.rollout.placement == "colocated" or nodes < 2:
        yield 0
        return
    yield from sorted({max(1, min(nodes - 1, round(share * nodes))) for share in SHARES})
