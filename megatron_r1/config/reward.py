"""What an answer is worth."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Weights of the rule rewards; the score is their weighted sum."""

    accuracy: float = 1.0
    """Weight of a right answer inside the answer tags."""
    format: float = 0.1
    """Weight of reasoning and answer being inside their tags."""
    format_style: str = "strict"
    """strict: every tag closed, once, in order; lenient: an answer tag that is opened need not be closed."""

    def __post_init__(self) -> None:
        at_least(self, 0, "accuracy", "format")
        one_of(self, "format_style", ("strict", "lenient"))
        if self.accuracy == 0 and self.format == 0:
            raise ConfigError("accuracy", self.accuracy, "at least one reward needs a weight above 0")
