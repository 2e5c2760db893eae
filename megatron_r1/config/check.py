"""What `check` must know of the machine on which a job will run."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of
from megatron_r1.config.hardware import GPUS
from megatron_r1.errors import ConfigError

NUM_CHECKS = 29


@dataclass(kw_only=True, slots=True)
class CheckConfig:
    """The machine of a job that is checked before it queues."""

    ranks: int = 0
    """Ranks of the trainer, one a GPU; 0 takes the fewest that `parallel` allows."""
    nodes: int = 0
    """Nodes of the job, those of servers included; 0 takes as many as its ranks fill."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    gpu: str = ""
    """GPU: A100, H100, H800, H200, B200, GB200, B300 or GB300; empty where the job runs on CPUs, or where it is not
    known."""
    gpu_memory_gb: float = 0.0
    """Memory of a GPU in gigabytes (10^9 bytes); 0 takes that of `gpu`."""
    host_memory_gb: float = 0.0
    """Memory of a node in gigabytes (10^9 bytes); 0 where it is not known."""
    network: str = ""
    """Network between nodes: infiniband, roce or ethernet; empty where it is not known."""
    partition: str = ""
    """SLURM partition of the job; empty takes the default partition."""
    time_limit_minutes: int = 0
    """Minutes that the job requests; 0 where that does not matter."""
    step_seconds: float = 0.0
    """Seconds that a step takes, where an earlier run has shown it; 0 where it is not known."""
    warn_only: list[int] = field(default_factory=list)
    """Numbers of checks whose refusal is only a warning."""

    def __post_init__(self) -> None:
        at_least(self, 0, "ranks", "nodes", "gpu_memory_gb", "host_memory_gb", "time_limit_minutes", "step_seconds")
        at_least(self, 1, "gpus_per_node")
        one_of(self, "gpu", ("", *GPUS))
        one_of(self, "network", ("", "infiniband", "roce", "ethernet"))
        for number in self.warn_only:
            if not 1 <= number <= NUM_CHECKS:
                raise ConfigError("warn_only", number, f"must be numbers of checks, 1 to {NUM_CHECKS}")

    @property
    def memory_gb(self) -> float:
        """Memory of a GPU in gigabytes; 0 where it is not known."""
        return self.gpu_memory_gb or (GPUS[self.gpu].memory_gb if self.gpu else 0)
