"""What a run costs: GPU hours, days, money, and how often it should save."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from megatron_r1.config.run import RunConfig
from megatron_r1.memory.storage import checkpoint_bytes

DAY, HOUR = 86_400, 3_600


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
    """Seconds between checkpoints that cost least."""
    save_every_steps: int
    lost_share: float
    """Share of the time that checkpoints and repeated work take."""


def cost(config: RunConfig, verb: str, gpus: int, per_node: int, step_seconds: float) -> Cost:
    """The cost of `plan.tokens`, or of `train.steps`.

    With C seconds for a checkpoint and M between failures the best interval is sqrt(2 C M) (Young 1974; Daly 2006,
    equation 12), and the share of time lost is C / interval + interval / (2 M). A checkpoint that is written in the
    background (train.async_save) costs no seconds, but the interval can be no shorter than writing it takes.
    """
    plan, train = config.plan, config.train
    tokens = train.global_batch_size * train.sequence_length
    steps = plan.tokens / tokens if plan.tokens else float(train.steps)
    writing = checkpoint_bytes(config, verb) / (plan.storage_gb_per_second * 1e9)
    between = plan.node_failure_days * DAY / max(1, gpus / per_node)
    interval = max(sqrt(2 * writing * between), writing, step_seconds)
    lost = (0.0 if train.async_save else writing / interval) + interval / (2 * between)
    seconds = steps * step_seconds * (1 + lost)
    hours = seconds / HOUR * gpus
    return Cost(
        steps, seconds / DAY, hours, hours * plan.gpu_hour_price, writing, interval,
        max(1, round(interval / step_seconds)), lost,
    )  # fmt: skip
