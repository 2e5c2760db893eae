"""Schedules of values that change during a run: by step, or by consumed tokens (DeepSeek-V3 report, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class PhaseConfig:
    """One phase of a value that follows consumed tokens; it begins where the phase before it ends."""

    until: int = 1
    """Consumed tokens at which the phase ends; after the last phase its value stays."""
    value: float = 0.0
    """Value at the end of the phase."""
    shape: str = "constant"
    """How the value gets there from the phase before: constant (at once), linear or cosine."""

    def __post_init__(self) -> None:
        at_least(self, 1, "until")
        at_least(self, 0, "value")
        one_of(self, "shape", ("constant", "linear", "cosine"))


@dataclass(kw_only=True, slots=True)
class BatchRampConfig:
    """Growth of the batch up to train.global_batch_size."""

    start: int = 1
    """Sequences per optimizer step at first."""
    increment: int = 1
    """Sequences that each increase adds; there are equally many tokens between increases."""
    tokens: int = 0
    """Consumed tokens at which the batch reaches its full size; 0 starts with the full size."""

    def __post_init__(self) -> None:
        at_least(self, 1, "start", "increment")
        at_least(self, 0, "tokens")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate by step or by tokens, and further values by tokens."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    lr_decay_style: str = "cosine"
    """After the warm-up: constant, linear or cosine by step until the last one, or tokens, by learning_rate_phases."""
    learning_rate_phases: list[PhaseConfig] = field(default_factory=list)
    """Learning rate by consumed tokens, from learning_rate on; for lr_decay_style=tokens."""
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    """Growth of the batch."""
    mtp_weight_phases: list[PhaseConfig] = field(default_factory=list)
    """Weight of the extra predictions' loss by consumed tokens, from model.mtp.loss_coefficient on."""
    bias_rate_phases: list[PhaseConfig] = field(default_factory=list)
    """Step of the balancing bias by consumed tokens, from model.moe.bias_update_rate on."""

    def __post_init__(self) -> None:
        within(self, 1e-12, 1.0, "learning_rate")
        at_least(self, 0, "min_learning_rate", "warmup_steps")
        one_of(self, "lr_decay_style", ("constant", "linear", "cosine", "tokens"))
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                "min_learning_rate", self.min_learning_rate, f"must be at most learning_rate={self.learning_rate}"
            )
        for name in ("learning_rate_phases", "mtp_weight_phases", "bias_rate_phases"):
            _check_order(name, getattr(self, name))
        if (self.lr_decay_style == "tokens") != bool(self.learning_rate_phases):
            raise ConfigError(
                "learning_rate_phases",
                self.learning_rate_phases,
                "must name phases for lr_decay_style=tokens"
                if self.lr_decay_style == "tokens"
                else f"must be [] for lr_decay_style={self.lr_decay_style}",
            )
        if self.learning_rate_phases and self.min_learning_rate != self.learning_rate_phases[-1].value:
            raise ConfigError(
                "min_learning_rate",
                self.min_learning_rate,
                f"must be {self.learning_rate_phases[-1].value}, the value of the last of learning_rate_phases",
            )


def _check_order(name: str, phases: Sequence[PhaseConfig]) -> None:
    for before, after in pairwise(phases):
        if after.until <= before.until:
            raise ConfigError(f"{name}.until", after.until, f"must be above {before.until}, the phase before")
