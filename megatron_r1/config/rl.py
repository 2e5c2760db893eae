"""Group relative policy optimization (DeepSeekMath, section 4; DeepSeek-R1, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.config.filters import FilterConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class RLConfig:
    """The objective and how a rollout is used."""

    prompts_per_rollout: int = 32
    """Prompts answered per rollout."""
    group_size: int = 16
    """Answers per prompt (G)."""
    mini_batches: int = 4
    """Optimizer steps per rollout; its samples are split among them at random."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    clip_epsilon: float = 0.2
    """Clip range of the probability ratio; R1's first stage uses 10."""
    kl_coefficient: float = 1e-3
    """Weight of the k3 penalty towards the reference policy; 0 drops the reference policy."""
    loss_level: str = "token"
    """Where the ratio is taken: token (DeepSeekMath) or sequence (the V3 and R1 reports)."""
    advantage_std: str = "population"
    """Divisor of the group advantage: population, sample or none."""
    old_log_probs: str = "rollout"
    """Denominator of the ratio: rollout (the engine's own log-probabilities) or trainer (computed again)."""
    routing_replay: bool = False
    """Whether the trainer's routers take the experts that the engine's took (R3)."""
    reference_reset_interval: int = 0
    """Rollouts between replacements of the reference policy by the current one; 0 never replaces it."""
    tokens_per_micro_batch: int = 8192
    """Padded tokens of one forward pass."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards over the rollout, so that nothing can be learnt."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which answers are learned from."""

    def __post_init__(self) -> None:
        at_least(self, 1, "prompts_per_rollout", "mini_batches", "inner_epochs", "tokens_per_micro_batch")
        at_least(self, 2, "group_size")
        within(self, 1e-6, 100.0, "clip_epsilon")
        at_least(self, 0, "kl_coefficient", "reference_reset_interval")
        one_of(self, "loss_level", ("token", "sequence"))
        one_of(self, "old_log_probs", ("rollout", "trainer"))
        one_of(self, "advantage_std", ("population", "sample", "none"))
        samples = self.prompts_per_rollout * self.group_size
        if samples % self.mini_batches:
            raise ConfigError("mini_batches", self.mini_batches, f"must divide the {samples} samples of a rollout")
