"""Which checkpoints a run keeps, from its configuration and the registry of metrics."""

from __future__ import annotations

import difflib

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
