"""Which checkpoints a run keeps, from its configuration and the registry of metrics, and which rollouts for them.

A run goes on exactly from each of its newest checkpoints (`train.save_total_limit`): the rollouts that were trained on
since then stay. Those that are kept for their step or for their metric alone serve to start other runs and to be
evaluated; a run that goes on from one, since newer ones were removed or damaged, samples anew what came after.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.checkpoint.retention import Retention
from megatron_r1.config.train import TrainConfig
from megatron_r1.errors import ConfigError
from megatron_r1.track.metrics import METRICS, find

KEY = "train.keep_best"


def retention_of(train: TrainConfig, verb: str = "") -> Retention:
    """The checkpoints that a run keeps.

    Args:
        verb: of the run, which must record the metric; empty takes any command's.

    Raises:
        ConfigError: the command does not record the metric, or nothing says which of its values is best.
    """
    if not train.keep_best:
        return Retention(train.save_total_limit, train.keep_every)
    try:
        metric = find(train.keep_best)
    except ValueError:
        metric = None
    if metric is None or metric.table or (verb and verb not in metric.commands):
        names = [one.name for one in METRICS if not one.table and (not verb or verb in one.commands)]
        near = ", ".join(difflib.get_close_matches(train.keep_best, names, n=3, cutoff=0.0))
        raise ConfigError(KEY, train.keep_best, f"must be a metric that {verb or 'training'} records, such as {near}")
    mode = train.keep_best_mode
    if mode == "auto" and not metric.better:
        raise ConfigError("train.keep_best_mode", mode, f"must be max or min: {metric.name} has no better direction")
    higher = mode == "max" if mode != "auto" else metric.better == "higher"
    return Retention(train.save_total_limit, train.keep_every, train.keep_best, higher)


def needs_rollouts_since(checkpoints: Sequence[tuple[int, Path]], retention: Retention) -> int:
    """The step after which rollouts are needed: that of the oldest checkpoint from which a run goes on exactly, or its
    start, 0, as long as it has fewer.

    Args:
        checkpoints: (step, path) of those that a run has, the newest first.
    """
    for_themselves = retention.beside_newest(checkpoints)
    # Beyond the newest ones there are more where some of these are damaged.
    newest = [step for number, (step, path) in enumerate(checkpoints)
              if number < retention.newest or path not in for_themselves]  # fmt: skip
    return min(newest) if len(newest) >= retention.newest else 0


def most_rollouts(train: TrainConfig, max_staleness: int) -> int:
    """Most rollouts that a run keeps at a time, as long as its saves succeed.

    Those since the oldest of the newest checkpoints, up to the next save; where it is written while the run trains, up
    to the save after it; and those that are sampled ahead.
    """
    intervals = train.save_total_limit + train.async_save
    return min(train.steps, train.save_interval * intervals + max_staleness)
