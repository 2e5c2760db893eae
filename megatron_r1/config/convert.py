"""Output of the verb convert."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Conversion of `init.from` to a Hugging Face folder or to a checkpoint of this project."""

    to: str = "hf"
    """hf (writes the run's folder hf/) or native (writes a checkpoint for init.from)."""
    dtype: str = "same"
    """fp32, bf16, fp8 (as DeepSeek-V3 is released; hf only), or same (as in init.from)."""
    vocab_size: int = 0
    """Rows of embedding and head: more than in init.from are filled with zeros, fewer cut the last; 0 keeps all."""
    max_shard_gb: float = 5.0
    """Largest file, in 10^9 bytes; a single tensor may be larger."""
    workers: int = 1
    """Processes among which the files are divided."""
    dry_run: bool = False
    """Read headers only and print what would be written; without init.from, print the index for `model`."""

    def __post_init__(self) -> None:
        one_of(self, "to", ("hf", "native"))
        one_of(self, "dtype", ("same", "fp32", "bf16", "fp8"))
        at_least(self, 1, "workers")
        at_least(self, 0, "vocab_size")
        if self.max_shard_gb <= 0:
            raise ConfigError("max_shard_gb", self.max_shard_gb, "must be above 0")
        if self.to == "native" and self.dtype == "fp8":
            raise ConfigError(
                "dtype", "fp8", "must be fp32, bf16 or same with to=native: training keeps no FP8 weights"
            )
