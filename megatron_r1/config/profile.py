"""Profiles: where the time and the memory of a training run go."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_r1.config.checks import within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Traces of some steps, and ranks that are slower than the others."""

    steps: str = ""
    """FIRST:LAST, the steps to trace, both included and counted as in metrics.jsonl; empty traces none. profile/ in
    the run's folder gets a Chrome trace, a table of the operators that take most time and memory, and on CUDA a memory
    snapshot. A traced step is slower; its results are the same."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are traced."""
    straggler_threshold: float = 0.7
    """A rank is named as slow when the median work of the ranks with the same layers is below this share of its own:
    forward and backward passes, without waiting for other ranks, over train.log_interval steps. 0 names none."""

    def __post_init__(self) -> None:
        if self.steps and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.steps):
            raise ConfigError("steps", self.steps, "must be FIRST:LAST, both included and from 1 on, or empty")
        if self.first_step > self.last_step:
            raise ConfigError("steps", self.steps, "the first step must not be above the last, which is included")
        if not self.ranks or min(self.ranks) < 0 or len({*self.ranks}) < len(self.ranks):
            raise ConfigError("ranks", self.ranks, "must be ranks from 0 on, each once")
        within(self, 0.0, 0.99, "straggler_threshold")

    @property
    def first_step(self) -> int:
        """First step that is traced; 0 without any."""
        return int(self.steps.partition(":")[0] or 0)

    @property
    def last_step(self) -> int:
        """Last step that is traced; 0 without any."""
        return int(self.steps.rpartition(":")[2] or 0)
