"""Learning rate by step."""

from __future__ import annotations

import math

from megatron_r1.config.train import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1) out of `steps`.

    Linear warm-up from 0, then the configured shape down to the final rate at the last step.
    """
    peak, final = schedule.learning_rate, schedule.final_learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / max(1, schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    match schedule.decay:
        case "constant":
            return peak
        case "linear":
            return peak + (final - peak) * done
        case _:
            return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * done))
