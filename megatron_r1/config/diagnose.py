"""Diagnosis of a difference between engine and trainer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least


@dataclass(kw_only=True, slots=True)
class DiagnoseConfig:
    """Which saved batch is looked at, and how closely."""

    rollout_file: str = ""
    """A file of a run's rollouts folder; empty takes the newest of the run in init.from whose weights it still has."""
    max_samples: int = 128
    """Answers to look at, from the first; 0 takes all."""
    tolerance: float = 1e-4
    """Mean difference of log-probabilities, in nats, up to which nothing is wrong; bf16 needs about 0.03."""

    def __post_init__(self) -> None:
        at_least(self, 0, "max_samples")
        at_least(self, 1e-9, "tolerance")
