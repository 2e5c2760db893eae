"""Metrics of updates, reduced over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.mesh import is_metrics_rank
from megatron_r1.train.hooks.balance import load_metrics
from megatron_r1.train.update import UpdateResult


def update_metrics(result: UpdateResult) -> dict[str, Any]:
    """Metrics of an update that every kind of training records; collective, the same on every rank."""
    metrics: dict[str, Any] = {
        **logged_metrics(result),
        "train/gradient_norm": result.gradient_norm,
        "train/skipped_updates": int(result.skipped),
    }
    if result.passes.mtp_loss is not None:
        metrics["train/mtp_loss"] = result.passes.mtp_loss
    return metrics | load_metrics(result.passes.expert_load)


def logged_metrics(result: UpdateResult) -> dict[str, float]:
    """All values that the loss function logged, by name, reduced like the loss; collective, the same on every rank."""
    [entries] = gather_logged([result])
    count = len(entries) if result.reduce == "mean" else 1
    return {name: sum(entry[name] for entry in entries) / count for name in entries[0]}


def gather_logged(results: Sequence[UpdateResult]) -> list[list[dict[str, float]]]:
    """Collective: values that the loss functions logged in each update, one entry for each micro-batch of any rank."""
    mine = [[{name: float(value) for name, value in entry.items()} for entry in r.passes.logged] for r in results]
    ranks = [updates for updates in all_gather_object(mine if is_metrics_rank() else None) if updates]
    return [[entry for updates in ranks for entry in updates[number]] for number in range(len(results))]
