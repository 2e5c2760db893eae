"""How parameters are updated, in every stage that trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
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
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    moment_precision: str = "fp32"
    """Type in which both moments rest between updates: fp32 or bf16 (DeepSeek-V3's)."""
    offload: bool = False
    """Whether the moments rest in the host's memory; each comes to the GPU for its update."""

    def __post_init__(self) -> None:
        within(self, 0.0, 0.99999, "beta1", "beta2")
        within(self, 1e-16, 1e-3, "epsilon")
        at_least(self, 0, "weight_decay", "clip_norm")
        one_of(self, "moment_precision", ("fp32", "bf16"))


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate by step."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay: str = "cosine"
    """Shape after the warm-up: constant, linear or cosine."""

    def __post_init__(self) -> None:
        within(self, 1e-12, 1.0, "learning_rate")
        at_least(self, 0, "final_learning_rate", "warmup_steps")
        one_of(self, "decay", ("constant", "linear", "cosine"))
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                "final_learning_rate", self.final_learning_rate, f"must be at most learning_rate={self.learning_rate}"
            )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = 2000
    """Optimizer steps; in reinforcement learning, rollouts."""
    sequence_length: int = 128
    """Tokens per pre-training sequence."""
    global_batch_size: int = 10
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 10
    """Sequences per forward pass of one rank."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate by step."""
    max_skipped_steps: int = 3
    """Steps in a row that may be skipped for non-finite gradients before the run stops."""
    checkpoint_interval: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Verified checkpoints to keep."""
    log_interval: int = 10
    """Steps between lines on the terminal; every step is recorded."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "global_batch_size", "micro_batch_size", "checkpoint_interval", "log_interval")
        at_least(self, 2, "sequence_length", "keep_checkpoints")
        at_least(self, 0, "max_skipped_steps")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                "micro_batch_size", self.micro_batch_size, f"must divide global_batch_size={self.global_batch_size}"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ConfigError("schedule.warmup_steps", self.schedule.warmup_steps, f"must be below steps={self.steps}")
