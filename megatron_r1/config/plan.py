"""What `plan` is given: the cluster, the budget, and what cannot be counted from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.config.hardware import GPUS


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """The cluster of a job that is planned, and its budget."""

    gpu: str = "H100"
    """GPU: A100, H100, H800, H200, B200, GB200, B300 or GB300, in any case."""
    gpus: int = 0
    """GPUs of the job; 0 takes the smallest cluster that the job fits."""
    most_gpus: int = 16384
    """Largest cluster that gpus=0 tries."""
    layouts: int = 5
    """Layouts that the table shows."""
    memory_share: float = 0.93
    """Share of a GPU's memory that a layout may fill."""
    imbalance: float = 0.0
    """Tokens of the busiest rank's experts over the mean, 1 where routing is forced to be even; 0 takes 1.1 for routers
    that a bias balances and 1.4 for others (plan/published.py)."""
    tokens: float = 0.0
    """Tokens to train on; 0 takes train.steps."""
    gpu_hour_price: float = 0.0
    """Price of a GPU for an hour; 0 leaves the cost out."""
    storage_gb_per_second: float = 20.0
    """Gigabytes (10^9 bytes) that all nodes together write to storage in a second."""
    node_failure_days: float = 264.0
    """Mean days between failures of one node; 264 are those of Llama 3's training (arXiv 2407.21783, section 3.3.4: 419
    unexpected interruptions of 2,048 nodes in 54 days)."""

    response_tokens: int = 0
    """Mean tokens of a response in reinforcement learning; 0 takes half of rollout.max_response_tokens."""
    prompt_tokens: int = 256
    """Mean tokens of a prompt in reinforcement learning."""
    reward_seconds: float = 0.0
    """Seconds that scoring a rollout takes after its last response."""
    calibrate: str = ""
    """Folder of a finished run of pretrain on GPUs of this kind, whose metrics.jsonl scales the predicted seconds;
    empty takes the constants of published steps."""
    calibrate_gpus: int = 0
    """GPUs of that run; 0 takes those of `gpus`."""

    def __post_init__(self) -> None:
        self.gpu = self.gpu.upper()
        one_of(self, "gpu", tuple(GPUS))
        at_least(self, 0, "gpus", "tokens", "gpu_hour_price", "calibrate_gpus", "response_tokens", "reward_seconds")
        at_least(self, 1, "most_gpus", "layouts", "prompt_tokens")
        within(self, 0.1, 1.0, "memory_share")
        within(self, 0.0, 16.0, "imbalance")
        within(self, 1e-3, 1e6, "storage_gb_per_second", "node_failure_days")
