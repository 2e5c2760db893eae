"""Values by step and by consumed tokens: pure functions of a run's state, so that a resume needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_r1.config.schedule import PhaseConfig, ScheduleConfig
from megatron_r1.config.train import TrainConfig


def value_at(start: float, phases: Sequence[PhaseConfig], tokens: int) -> float:
    """The value of a schedule by consumed tokens.

    Args:
        start: value before the first phase; constant without phases.
        phases: consecutive phases; the first starts at 0 tokens.
        tokens: consumed before the step.
    """
    since = 0
    for phase in phases:
        if tokens < phase.until:
            return _within(phase, start, (tokens - since) / (phase.until - since))
        start, since = phase.value, phase.until
    return start


def _within(phase: PhaseConfig, start: float, done: float) -> float:
    """The value after the share `done` of a phase."""
    return phase.value if phase.shape == "constant" else _between(start, phase.value, phase.shape, done)


def _between(start: float, end: float, shape: str, done: float) -> float:
    """Interpolation from `start` to `end`, linear or half a cosine, after the share `done` of the phase."""
    if shape == "linear":
        return start + (end - start) * done
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def learning_rate(schedule: ScheduleConfig, step: int, steps: int, tokens: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1) out of `steps`, before which `tokens` were consumed.

    Linear warm-up from 0, then the configured shape: by step down to the minimum at the last step, or by tokens.
    """
    peak, final = schedule.learning_rate, schedule.min_learning_rate
    warm = min(1.0, step / max(1, schedule.warmup_steps))
    if schedule.lr_decay_style == "tokens":
        return warm * value_at(peak, schedule.learning_rate_phases, tokens)
    if warm < 1.0 or schedule.lr_decay_style == "constant":
        return warm * peak
    done = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    return _between(peak, final, schedule.lr_decay_style, done)


def batch_size(train: TrainConfig, tokens: int) -> int:
    """Sequences of the step before which `tokens` were consumed.

    As in megatron-core, the ramp has one part of equal length for each increment. The computation is in integers, so
    that no rounding decides at which step the batch grows.
    """
    ramp, sizes = train.schedule.batch_ramp, train.batch_sizes()
    if tokens >= ramp.tokens:
        return train.global_batch_size
    return sizes[tokens * (len(sizes) - 1) // ramp.tokens]
