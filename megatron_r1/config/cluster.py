"""A cluster, and one job that `submit` sends to it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.secrets import is_secret, without_secrets
from megatron_r1.errors import ConfigError

TIME_LIMIT = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """A cluster's profile: what is the same for all jobs there. A file of its own in configs/cluster/."""

    account: str = ""
    """Account that is charged; empty takes the user's own."""
    partition: str = ""
    """Partition; empty takes the cluster's default."""
    qos: str = ""
    """Quality of service; empty takes the account's default."""
    gpu: str = ""
    """Kind of the GPUs, as of check.gpu, against whose memory a job is checked; empty where it is not known."""
    gpus_per_node: int = 8
    """GPUs of a node; 0 for nodes without GPUs."""
    ranks_per_node: int = 0
    """Ranks of the trainer on a node; 0 starts one for each GPU."""
    cpus_per_rank: int = 0
    """Cores of each rank; 0 leaves the number to SLURM."""
    memory_per_node: str = "0"
    """Memory of a node, as of sbatch's --mem: 0 takes all of it, empty leaves it to SLURM."""
    exclusive: bool = True
    """Whether jobs share no node with others."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --constraint=h100."""
    container: str = "none"
    """none (the virtual environment that submits), pyxis (srun's --container-image) or apptainer."""
    image: str = ""
    """Image of the container: of pyxis a .sqsh file or a name in a registry, of apptainer a .sif file."""
    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees, beside the checkout and the working directory: PATH or PATH:INSIDE."""
    python: str = ""
    """Python that runs the job; empty takes the one that submits, or `python` in a container."""
    network_interface: str = ""
    """Interface by which nodes find each other (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); empty lets them choose."""
    scratch: str = ""
    """Folder on each node's own disk for temporary files and compiled kernels; empty takes /tmp."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, such as NCCL_IB_HCA; no secrets, since they stand in the script."""
    env_file: str = ""
    """File of NAME=value lines that the job reads at its start, for keys such as WANDB_API_KEY."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of the job, such as `module load cuda`."""

    def __post_init__(self) -> None:
        one_of(self, "container", ("none", "pyxis", "apptainer"))
        one_of(self, "gpu", ("", *GPUS))
        at_least(self, 0, "gpus_per_node", "ranks_per_node", "cpus_per_rank")
        if not self.ranks:
            raise ConfigError("ranks_per_node", 0, "must be at least 1 where gpus_per_node is 0")
        if (self.container != "none") != bool(self.image):
            needed = "must be empty without a container" if self.image else f"must name the image of {self.container}"
            raise ConfigError("image", self.image, needed)
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ConfigError("environment", name, "must be a name of an environment variable")
            if is_secret(name):
                raise ConfigError("environment", name, "must be in cluster.env_file: this is in the job's script")
        for line in self.setup:
            if (masked := without_secrets(line, ())) != line:
                raise ConfigError("setup", masked, "must set no secret: cluster.env_file is for those")
        for option in self.sbatch_options:
            if not option.startswith("--"):
                raise ConfigError("sbatch_options", option, "must be options such as --constraint=h100")

    @property
    def ranks(self) -> int:
        """Ranks of the trainer on a node."""
        return self.ranks_per_node or self.gpus_per_node


@dataclass(kw_only=True, slots=True)
class SubmitConfig:
    """One job on a cluster."""

    command: str = ""
    """Verb that the job runs: the word after `submit`."""
    arguments: list[str] = field(default_factory=list)
    """The job's command line; `submit` sets it."""
    nodes: int = 1
    """Nodes of the job, those of engines among them."""
    engine_nodes: int = 0
    """Last nodes of the job, which run the servers of reinforcement learning; 0 has the trainer's nodes run them."""
    heterogeneous: bool = False
    """Whether the engine nodes are a component of a heterogeneous job, rather than the last nodes of one allocation."""
    stage_jobs: bool = True
    """Of a recipe: a job for each stage, which waits for the one before; else one job runs all stages."""
    time_limit: str = "04:00:00"
    """Time limit of each job, as [days-]hours:minutes:seconds."""
    restart: str = "requeue"
    """How a job that was stopped goes on: requeue (the job itself is queued again), chain (each job queues the next,
    which starts if it does not finish; for clusters that forbid requeueing), singleton (`generations` jobs are queued
    at once and run one after the other) or none."""
    generations: int = 4
    """Jobs that restart=singleton queues."""
    max_restarts_without_progress: int = 3
    """Restarts without a new checkpoint, rollout or part of samples after which the run is stopped."""
    signal_before_s: int = 300
    """Seconds before the time limit at which SLURM signals the job and its trainer saves; at least the longest step
    with its save."""
    grace_s: int = 120
    """Seconds that the trainer has to save when servers on other nodes have ended."""
    preflight: bool = True
    """Check the nodes first: GPUs, an all-reduce, the run folder, disk, shared memory, ports and judge. A minute, and a
    failure ends the job before a model is built."""
    preflight_limit_s: int = 600
    """Seconds after which a preflight has failed."""
    dry_run: bool = False
    """Show the script and the resolved configuration; write and submit nothing. Where a check refuses the job, its
    table follows, and the exit status is 2."""

    def __post_init__(self) -> None:
        one_of(self, "restart", ("requeue", "chain", "singleton", "none"))
        at_least(self, 1, "nodes", "generations", "max_restarts_without_progress", "preflight_limit_s")
        at_least(self, 0, "signal_before_s", "grace_s", "engine_nodes")
        if self.engine_nodes >= self.nodes:
            raise ConfigError("engine_nodes", self.engine_nodes, f"must be below nodes={self.nodes}: others train")
        if not TIME_LIMIT.fullmatch(self.time_limit):
            raise ConfigError("time_limit", self.time_limit, "must be [days-]hours:minutes:seconds")
        if self.signal_before_s >= self.seconds:
            raise ConfigError("signal_before_s", self.signal_before_s, f"must be below time_limit={self.time_limit}")

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
