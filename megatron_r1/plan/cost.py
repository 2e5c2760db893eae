"""What a run costs: GPU hours, days, money, and how often it should save."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, inf, sqrt

from megatron_r1.config.run import RunConfig
from megatron_r1.memory.storage import checkpoint_bytes

DAY, HOUR = 86_400, 3_600
RESTART_S = 300.0
"""Seconds from a failure until the next step: noticing it, another node, start-up, reading the checkpoint."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A whole run on one layout."""

    steps: float
    days: float
    """Days with the time that failures and checkpoints cost."""
    gpu_hours: float
    money: float
    """0 where no price is configured."""
    checkpoint_seconds: float
    """Seconds that writing a checkpoint takes."""
    save_every_seconds: float
    """Seconds of work between checkpoints."""
    save_every_steps: int
    lost_share: float
    """Share of the time that checkpoints and repeated work take."""


def cost(config: RunConfig, verb: str, gpus: int, per_node: int, step_seconds: float) -> Cost:
    """The cost of `plan.tokens`, or of `train.steps`.

    Checkpoints are saved at the interval that loses least. One that is written in the background (train.async_save)
    costs no seconds, but the interval can be no shorter than writing it takes, and a failure also costs the work of the
    seconds in which the last one was being written. There the interval is that of Young 1974, sqrt(2 C M) with C
    seconds for a checkpoint and M between failures: saving as often as possible would gain little.
    """
    plan, train = config.plan, config.train
    tokens = train.global_batch_size * train.sequence_length
    steps = plan.tokens / tokens if plan.tokens else float(train.steps)
    writing = checkpoint_bytes(config, verb) / (plan.storage_gb_per_second * 1e9)
    between = plan.node_failure_days * DAY / max(1, gpus / per_node)
    if train.async_save:
        interval = max(sqrt(2 * writing * between), writing, step_seconds)
        lost = lost_share(interval, 0.0, between, RESTART_S + writing)
    else:
        interval, lost = least_lost(writing, between, RESTART_S, step_seconds)
    seconds = steps * step_seconds / (1 - lost) if lost < 1 else inf
    hours = seconds / HOUR * gpus
    return Cost(
        steps, seconds / DAY, hours, hours * plan.gpu_hour_price, writing, interval,
        max(1, round(interval / step_seconds)), lost,
    )  # fmt: skip


def lost_share(interval: float, saving: float, between: float, restart: float) -> float:
    """Share of the time lost to exponentially distributed failures, and to saving against them.

    `interval` seconds of work take between * exp(restart / between) * (exp((interval + saving) / between) - 1) seconds
    (Daly 2006, equation 13).
    """
    if interval > 50 * between:
        return 1.0
    return 1 - interval / (between * exp(restart / between) * expm1((interval + saving) / between))


def least_lost(saving: float, between: float, restart: float, shortest: float) -> tuple[float, float]:
    """The interval between saves that loses the smallest share of the time, `shortest` or longer, and that share."""
    intervals = [shortest * 1.02**number for number in range(600)]
    lost, interval = min((lost_share(one, saving, between, restart), one) for one in intervals)
    return interval, lost
