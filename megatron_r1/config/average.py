"""Checkpoints whose weights are averaged."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class AverageConfig:
    """The mean of several models of one shape (Wortsman et al. 2022, "Model soups")."""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> run, checkpoint or hf:FOLDER; two at the least. The result has the types, the tokenizer and the model
    section of the first."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name -> weight of that model, relative to the others'; 1 for models without one."""

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in self.models:
                raise ConfigError(f"weights.{name}", weight, f"must be of one of {', '.join(self.models) or 'models'}")
            if weight <= 0:
                raise ConfigError(f"weights.{name}", weight, "must be above 0")

    def shares(self) -> dict[str, float]:
        """Name -> its share of the mean; they add up to 1."""
        weights = {name: self.weights.get(name, 1.0) for name in self.models}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}
