"""Metrics of an update, averaged over micro-batches and data-parallel ranks."""

from __future__ import annotations

from typing import Any

from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.mesh import is_metrics_rank
from megatron_r1.train.hooks.balance import load_metrics
from megatron_r1.train.step import UpdateResult


def update_metrics(result: UpdateResult) -> dict[str, Any]:
    """What every training stage records of an update."""
    metrics: dict[str, Any] = {"gradient_norm": result.gradient_norm, "skipped": int(result.skipped)}
    if result.passes.mtp_loss is not None:
        metrics["mtp_loss"] = result.passes.mtp_loss
    return metrics | load_metrics(result.passes.expert_load)


def mean_loss(result: UpdateResult) -> float:
    """Mean loss over micro-batches and data-parallel ranks, the same on every rank."""
    return mean_logged(result)["loss"]


def mean_logged(result: UpdateResult) -> dict[str, float]:
    """All that the loss function logged, by name, as means over micro-batches and data-parallel ranks."""
    logged = result.passes.logged if is_metrics_rank() else []
    mine = [{name: float(value) for name, value in entry.items()} for entry in logged]
    entries = [entry for rank in all_gather_object(mine) for entry in rank]
    return {name: sum(entry[name] for entry in entries) / len(entries) for name in entries[0]}
