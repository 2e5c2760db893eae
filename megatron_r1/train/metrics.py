"""Metrics of updates, reduced over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_r1.parallel.comm import sum_over_ranks
from megatron_r1.parallel.mesh import is_metrics_rank
from megatron_r1.train.hooks.balance import load_metrics
from megatron_r1.train.update import UpdateResult

ENTRIES = "entries"
"""Micro-batches of all metrics ranks."""


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
    sums = sum_over_ranks("logged", _with_entries(result))
    entries = sums.pop(ENTRIES)
    return {name: value / (entries if result.reduce == "mean" else 1) for name, value in sums.items()}


def logged_sums(results: Sequence[UpdateResult]) -> dict[str, float]:
    """By name what the loss functions logged, summed over updates and micro-batches; nothing but on metrics ranks."""
    sums: dict[str, float] = {}
    if is_metrics_rank():
        for entry in (entry for result in results for entry in result.passes.logged):
            for name, value in entry.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _with_entries(result: UpdateResult) -> dict[str, float]:
    sums = logged_sums([result])
    return {**sums, ENTRIES: float(len(result.passes.logged))} if sums else {}
