"""The critic of proximal policy optimization (Schulman et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, within


@dataclass(kw_only=True, slots=True)
class CriticConfig:
    """A value model of the policy's shape, trained beside it; where rl.advantage_estimator is critic."""

    init_from: str = ""
    """Where its first weights come from: a run or checkpoint of the verb reward; empty takes the policy's own, with a
    head that says 0."""
    learning_rate: float = 1e-3
    """Peak learning rate; it rises and falls as the policy's does, and the rest of train.optimizer holds for both."""
    gamma: float = 1.0
    """Gamma: what a reward is worth one token earlier."""
    gae_lambda: float = 1.0
    """Lambda of generalized advantage estimation; at 1, with no discount, an advantage is the return less the value."""
    value_clip: float = 0.2
    """How far a value may move in one rollout before its loss holds it back."""
    whiten_advantages: bool = True
    """Whether advantages are brought to mean 0 and deviation 1 over all tokens of a rollout."""
    warmup_rollouts: int = 0
    """First rollouts in which the critic alone learns: the policy's learning rate is 0."""

    def __post_init__(self) -> None:
        within(self, 1e-12, 1.0, "learning_rate")
        within(self, 0.0, 1.0, "gamma", "gae_lambda")
        within(self, 1e-6, 1e6, "value_clip")
        at_least(self, 0, "warmup_rollouts")
