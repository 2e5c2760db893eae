"""Reinforcement learning: the objective (GRPO and its kin, PPO), the critic, and which responses train the policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class CriticConfig:
    """A value model of the policy's shape, trained together with it; where rl.advantage_estimator is critic."""

    init_from: str = ""
    """Initial weights: a run or checkpoint of the verb reward_model; empty takes the policy's own, with a value head of
    zeros."""
    learning_rate: float = 1e-3
    """Peak learning rate, with the policy's schedule; the other keys of train.optimizer hold for both."""
    gamma: float = 1.0
    """Discount factor per token."""
    gae_lambda: float = 1.0
    """Lambda of generalized advantage estimation; at 1, with gamma=1, an advantage is return minus value."""
    value_clip: float = 0.2
    """Clip range of a value around its estimate at the start of the rollout (PPO's value clipping)."""
    whiten_advantages: bool = True
    """Whether advantages are normalised to mean 0 and standard deviation 1 over all tokens of a rollout."""
    warmup_rollouts: int = 0
    """First rollouts that train the critic alone: the policy's learning rate is 0."""

    def __post_init__(self) -> None:
        within(self, 1e-12, 1.0, "learning_rate")
        within(self, 0.0, 1.0, "gamma", "gae_lambda")
        within(self, 1e-6, 1e6, "value_clip")
        at_least(self, 0, "warmup_rollouts")


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Filters of responses and groups between scoring and training; see rl/generation/filters.py for the sources."""

    zero_std_groups: str = "keep"
    """Groups whose rewards are all equal, so that their advantages are 0: keep or drop (dynamic sampling)."""
    max_resample_rounds: int = 0
    """Most rounds in which further prompts are sampled to replace dropped groups."""
    truncated: str = "keep"
    """Responses that reached the length limit: keep, mask (they count in the baseline, but not in the loss) or drop."""
    duplicates: str = "keep"
    """Responses of a group with the same tokens: keep, or drop all but the first."""

    def __post_init__(self) -> None:
        one_of(self, "zero_std_groups", ("keep", "drop"))
        one_of(self, "truncated", ("keep", "mask", "drop"))
        one_of(self, "duplicates", ("keep", "drop"))
        within(self, 0, 100, "max_resample_rounds")


@dataclass(kw_only=True, slots=True)
class ImportanceSamplingConfig:
    """Importance weights that correct for the difference between the probabilities of trainer and engine; see
    rl/objective/importance_weights.py."""

    kind: str = "none"
    """none, truncated (weights are clipped to low and high) or masked (weights outside of low and high become 0); needs
    old_logprobs_from=trainer."""
    level: str = "token"
    """token (a weight for each token) or sequence (the product over a response's tokens)."""
    low: float = 0.0
    """Smallest weight, trainer's probability / engine's."""
    high: float = 2.0
    """Largest weight, trainer's probability / engine's."""

    def __post_init__(self) -> None:
        one_of(self, "kind", ("none", "truncated", "masked"))
        one_of(self, "level", ("token", "sequence"))
        within(self, 0.0, 1.0, "low")
        within(self, 1.0, 1e6, "high")


@dataclass(kw_only=True, slots=True)
class MismatchConfig:
    """Thresholds above which a warning is logged: how trainer and engine disagree on sampled tokens before any update.
    0 never warns.

    With rollout.max_staleness the responses come from older weights, and the numbers include that difference too.
    """

    logprob_max_abs_warn: float = 0.0
    """Largest absolute difference of a token's log-probability, in nats."""
    k3_warn: float = 0.05
    """Estimate of KL(engine || trainer), in nats per token."""
    outside_range_warn: float = 0.05
    """Share of tokens whose ratio, trainer's probability / engine's, is outside of low and high."""
    low: float = 0.5
    """Ratios below this count for outside_range_warn."""
    high: float = 2.0
    """Ratios above this count for outside_range_warn."""

    def __post_init__(self) -> None:
        at_least(self, 0, "logprob_max_abs_warn", "k3_warn", "outside_range_warn")
        within(self, 0.0, 1.0, "low")
        within(self, 1.0, 1e6, "high")


@dataclass(kw_only=True, slots=True)
class PolicyTeacherConfig:
    """On-policy distillation: a teacher takes the reference policy's place, and the policy learns from its own samples
    (Agarwal et al. 2024, "On-Policy Distillation of Language Models", with the reverse KL divergence)."""

    from_: str = ""
    """Run directory, checkpoint directory or hf:FOLDER of a model of any shape with the policy's vocabulary; empty has
    no teacher. Written `rl.teacher.from`. It stays in the devices' memory beside the policy."""


@dataclass(kw_only=True, slots=True)
class RLConfig:
    """The objective, and how a rollout is divided into updates."""

    prompts_per_rollout: int = 32
    """Prompts per rollout."""
    group_size: int = 16
    """Responses per prompt (G)."""
    updates_per_rollout: int = 4
    """Mini-batches that a rollout is split into at random; each is one optimizer step of every epoch."""
    epochs_per_rollout: int = 1
    """Epochs over each rollout."""
    objective: str = "grpo"
    """The policy term: grpo (a ratio per token, DeepSeekMath), grpo_sequence (a ratio per response, the V3 and R1
    reports), on_policy (no ratio: one update per rollout), gspo, gspo_token or cispo; see
    rl/objective/policy_terms.py."""
    loss_aggregation: str = "sequence_mean"
    """How token losses become one loss: sequence_mean (mean over each response's tokens, then over responses),
    token_mean (mean over all tokens, DAPO) or constant (sum over tokens / rollout.max_response_tokens, Dr.GRPO)."""
    clip_epsilon: float = 0.2
    """Clip range of the probability ratio; R1's first stage uses 10."""
    clip_epsilon_high: float = 0.0
    """Clip range above a ratio of 1 (DAPO's clip-higher); 0 takes clip_epsilon."""
    kl_coefficient: float = 1e-3
    """Weight of the KL penalty against the reference policy; with 0 there is no reference policy. With teacher.from, of
    the divergence KL(policy || teacher)."""
    kl_estimator: str = "k3"
    """Estimator of the KL penalty: k1, k2 or k3 from sampled tokens, or exact over the whole vocabulary."""
    kl_placement: str = "loss"
    """Where the KL penalty is added: loss, reward (its sum over a response; per token with advantage_estimator=critic)
    or advantage (each token's own, after the rewards are normalised; of kl_estimator=k1)."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's entropy, which is maximised."""
    advantage_estimator: str = "group"
    """Baseline of a response's reward: group (the other responses to its prompt), process (each step against all steps
    of those responses; needs reward.steps) or critic (a value model: PPO)."""
    advantage_std: str = "population"
    """Standard deviation that divides the group advantage: population, sample or none."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value model."""
    teacher: PolicyTeacherConfig = field(default_factory=PolicyTeacherConfig)
    """A teacher in the reference policy's place."""
    old_logprobs_from: str = "rollout"
    """Denominator of the ratio: rollout (the engine's own log-probabilities) or trainer (recomputed)."""
    routing_replay: bool = False
    """Whether the trainer's routers use the experts that the engine's routers chose (R3)."""
    reference_sync_interval: int = 0
    """Rollouts after which the current policy replaces the reference policy; 0 never replaces it."""
    tokens_per_micro_batch: int = 8192
    """Tokens of one forward pass; responses lie end to end in it."""
    shuffle_rewards: bool = False
    """Control experiment: shuffle the rewards over the rollout, so that they carry no signal."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which responses train the policy."""
    importance_sampling: ImportanceSamplingConfig = field(default_factory=ImportanceSamplingConfig)
    """Importance weights for the difference between trainer and engine."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Thresholds of warnings about that difference."""
    sample_table_interval: int = 50
    """Steps between tables of sampled responses in wandb, and in the run's folder `tables`; 0 makes none. A run without
    wandb makes none either."""
    sample_table_rows: int = 8
    """Responses in such a table; of a longer prompt or response it has the first and the last 1,000 characters."""

    def __post_init__(self) -> None:
        at_least(self, 0, "sample_table_interval")
        within(self, 1, 1000, "sample_table_rows")
        at_least(self, 1, "prompts_per_rollout", "updates_per_rollout", "epochs_per_rollout", "tokens_per_micro_batch")
        at_least(self, 1, "group_size")
        one_of(self, "advantage_estimator", ("group", "process", "critic"))
        within(self, 1e-6, 100.0, "clip_epsilon")
        at_least(self, 0, "kl_coefficient", "reference_sync_interval", "entropy_coefficient")
        within(self, 0.0, 100.0, "clip_epsilon_high")
        one_of(self, "objective", ("grpo", "grpo_sequence", "on_policy", "gspo", "gspo_token", "cispo"))
        one_of(self, "loss_aggregation", ("sequence_mean", "token_mean", "constant"))
        one_of(self, "kl_estimator", ("k1", "k2", "k3", "exact"))
        one_of(self, "kl_placement", ("loss", "reward", "advantage"))
        one_of(self, "old_logprobs_from", ("rollout", "trainer"))
        one_of(self, "advantage_std", ("population", "sample", "none"))
        if self.importance_sampling.kind != "none" and self.old_logprobs_from != "trainer":
            allowed = (
                "must be trainer with importance_sampling.kind: the ratio to the engine's log-probs corrects already"
            )
            raise ConfigError("old_logprobs_from", self.old_logprobs_from, allowed)
        if self.objective == "on_policy" and self.updates_per_rollout * self.epochs_per_rollout > 1:
            key = "updates_per_rollout" if self.updates_per_rollout > 1 else "epochs_per_rollout"
            raise ConfigError(key, getattr(self, key), "must be 1 with objective=on_policy, which has no old policy")
        self._check_token_advantages()
        if self.advantage_estimator == "process" and self.shuffle_rewards:
            raise ConfigError(
                "shuffle_rewards", True, "must be false with advantage_estimator=process: steps keep their rewards"
            )
        if self.teacher.from_:
            self._check_teacher()
        if self.group_size == 1:
            self._check_filters_of_single_responses()
        samples = self.prompts_per_rollout * self.group_size
        if samples % self.updates_per_rollout:
            raise ConfigError(
                "updates_per_rollout", self.updates_per_rollout, f"must divide the {samples} samples of a rollout"
            )

    def learns_from_single_responses(self) -> bool:
        """Whether a response says something without others to its prompt: by a critic, or by a teacher's tokens."""
        taught = bool(self.teacher.from_) and self.kl_placement != "reward"
        return taught or self.advantage_estimator == "critic"

    def _check_token_advantages(self) -> None:
        """Refuse what contradicts advantages that differ from token to token."""
        if self.kl_placement == "advantage" and self.kl_estimator != "k1":
            allowed = "must be k1 with kl_placement=advantage: only its gradient is then that of the divergence"
            raise ConfigError("kl_estimator", self.kl_estimator, allowed)
        if self.objective not in ("grpo_sequence", "gspo"):
            return
        for key, of_responses in (("advantage_estimator", ("group",)), ("kl_placement", ("loss", "reward"))):
            if (value := getattr(self, key)) not in of_responses:
                allowed = (
                    f"must be one of grpo, on_policy, gspo_token, cispo with {key}={value}, which gives each token its "
                    "own advantage"
                )
                raise ConfigError("objective", self.objective, allowed)

    def _check_teacher(self) -> None:
        if not self.kl_coefficient:
            raise ConfigError("kl_coefficient", 0.0, "must be above 0 with teacher.from: it is the teacher's weight")
        if self.reference_sync_interval:
            allowed = "must be 0 with teacher.from: the policy never replaces its teacher"
            raise ConfigError("reference_sync_interval", self.reference_sync_interval, allowed)
        if (self.kl_placement, self.kl_estimator) == ("loss", "k1"):
            allowed = "must be exact, k2 or k3 with teacher.from and kl_placement=loss: k1's gradient is 0 on average"
            raise ConfigError("kl_estimator", self.kl_estimator, allowed)

    def _check_filters_of_single_responses(self) -> None:
        for name in ("zero_std_groups", "truncated", "duplicates"):
            if (value := getattr(self.filters, name)) != "keep":
                raise ConfigError(
                    f"filters.{name}", value, "must be keep with group_size=1: it would drop whole groups"
                )
