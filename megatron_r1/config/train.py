"""Training loop and optimizer, for every verb that trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.config.schedule import ScheduleConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    moments_dtype: str = "fp32"
    """Type of both moments between updates: fp32 or bf16 (DeepSeek-V3's)."""
    offload: bool = False
    """Whether the moments are in host memory between updates; each parameter's come to the GPU for its update."""

    def __post_init__(self) -> None:
        within(self, 0.0, 0.99999, "beta1", "beta2")
        within(self, 1e-16, 1e-3, "epsilon")
        at_least(self, 0, "weight_decay", "max_grad_norm")
        one_of(self, "moments_dtype", ("fp32", "bf16"))


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = 2000
    """Optimizer steps; in reinforcement learning, rollouts."""
    sequence_length: int = 128
    """Tokens per pre-training sequence."""
    global_batch_size: int = 10
    """Sequences per optimizer step, over all ranks; schedule.batch_ramp grows up to it."""
    micro_batch_size: int = 10
    """Sequences per forward pass of one rank."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate, and other values that change during the run."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights, which is in host memory; 0 has no average."""
    balance_window: int = 100
    """Steps over which the experts' loads are summed up to measure their balance."""
    max_skipped_steps: int = 3
    """Consecutive steps that may be skipped for non-finite gradients; with more, the run stops."""
    save_interval: int = 200
    """Steps between checkpoints."""
    async_save: bool = False
    """Whether checkpoints are written while training continues; needs another copy of the weights in host memory."""
    save_total_limit: int = 2
    """Number of newest verified checkpoints to keep; older ones are deleted, but for those of the next two keys and
    those that another command reads."""
    keep_every: int = 0
    """Steps, a multiple of save_interval: checkpoints of every such step are kept for good; 0 keeps none so."""
    keep_best: str = ""
    """Metric whose best checkpoint is kept too, such as eval/loss (megatron_r1/track/README.md); its value is that of
    the newest row since the checkpoint before. Of equal values the earlier one is kept; empty keeps none so."""
    keep_best_mode: str = "auto"
    """Which value is best: max, min, or auto (the metric's own direction)."""
    save_before_limit_s: float = 0.0
    """Seconds before the time limit of its job at which the run saves and stops, to go on in the next job; more than
    the longest step with its save. 0 does not look at the clock and waits for the scheduler's signal."""
    log_interval: int = 10
    """Steps between lines on the terminal; every step is recorded."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "global_batch_size", "micro_batch_size", "save_interval", "log_interval")
        at_least(self, 1, "balance_window")
        within(self, 0.0, 0.9999999, "ema_decay")
        at_least(self, 2, "sequence_length", "save_total_limit")
        at_least(self, 0, "max_skipped_steps", "save_before_limit_s", "keep_every")
        one_of(self, "keep_best_mode", ("auto", "max", "min"))
        if self.keep_every % self.save_interval:
            allowed = f"must be a multiple of save_interval={self.save_interval}, or 0"
            raise ConfigError("keep_every", self.keep_every, allowed)
        ramp = self.schedule.batch_ramp
        if ramp.tokens and ramp.start > self.global_batch_size:
            raise ConfigError(
                "schedule.batch_ramp.start", ramp.start, f"must be at most global_batch_size={self.global_batch_size}"
            )
        if ramp.tokens and (self.global_batch_size - ramp.start) % ramp.increment:
            raise ConfigError(
                "schedule.batch_ramp.increment",
                ramp.increment,
                f"must divide what lies between start={ramp.start} and global_batch_size={self.global_batch_size}",
            )
        for size in self.batch_sizes():
            if size % self.micro_batch_size:
                raise ConfigError(
                    "micro_batch_size", self.micro_batch_size, f"must divide {self.batch_size_key(size)}={size}"
                )
        if self.schedule.warmup_steps >= self.steps:
            raise ConfigError(
                "schedule.warmup_steps", self.schedule.warmup_steps, f"must be below train.steps={self.steps}"
            )

    def batch_sizes(self) -> range:
        """Every number of sequences that a step of this run may have, rising to global_batch_size."""
        ramp, full = self.schedule.batch_ramp, self.global_batch_size
        return range(ramp.start, full + 1, ramp.increment) if ramp.tokens else range(full, full + 1)

    def batch_size_key(self, size: int) -> str:
        """The key to name in an error about a batch of `size` sequences."""
        return "global_batch_size" if size == self.global_batch_size else "schedule.batch_ramp"
