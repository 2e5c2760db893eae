"""One run: every section together."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.average import AverageConfig
from megatron_r1.config.check import CheckConfig
from megatron_r1.config.checks import at_least, one_of
from megatron_r1.config.cluster import ClusterConfig, SubmitConfig
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.curate import CurateConfig
from megatron_r1.config.data import DataConfig
from megatron_r1.config.dpo import DpoConfig
from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.config.jobs import DiagnoseConfig, EvaluateConfig, SampleConfig, TrackConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.plan import PlanConfig
from megatron_r1.config.profile import ProfileConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.routing import RoutingConfig
from megatron_r1.config.sft import SftConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.config.watch import WatchConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """Initial weights."""

    from_: str = ""
    """Run directory, checkpoint directory or hf:FOLDER; empty initialises at random. Written `init.from`."""
    weights: str = "model"
    """Weights to read from checkpoints, here and in evaluate.models: model, or ema (the moving average)."""

    def __post_init__(self) -> None:
        one_of(self, "weights", ("model", "ema"))


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The configuration of one command."""

    name: str = "run"
    """Name of the run; its directory is ROOT/NAME."""
    root: str = "runs"
    """Folder that holds run directories."""
    seed: int = 0
    """Seed of initial weights, data order and sampling."""
    platform: str = "auto"
    """cuda, cpu, or auto (refused inside a SLURM job)."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores that the job may use among its ranks."""
    distributed_timeout_minutes: int = 120
    """Minutes after which a collective operation that a rank has not joined ends the run, where no deadline of `watch`
    does so before. Ranks that wait for one that generates, scores, starts servers or saves do so outside of
    collective operations, as long as it takes. The launcher notices a rank that died at once."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """In which number format linear layers multiply."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    """Recomputation, overlap and fusion."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How parameters are updated."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When a run that hangs is ended."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """How stages after pre-training treat the routers."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Rewards of a response."""
    rl: RLConfig = field(default_factory=RLConfig)
    """The reinforcement-learning objective."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Supervised fine-tuning."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """Training of a reward model."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """Direct preference optimization."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation of models."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """A sampling job."""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """Rejection sampling and data assembly."""
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    """A diagnosis of a saved batch of responses."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Where metrics are recorded."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Where time and memory go."""
    init: InitConfig = field(default_factory=InitConfig)
    """Initial weights."""
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    """Output of convert."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """Checkpoints whose weights are averaged."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Stages of a recipe."""
    check: CheckConfig = field(default_factory=CheckConfig)
    """The machine of a job that is checked."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The cluster and the budget of a job that is planned."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster that a job is submitted to."""
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    """A job on a cluster."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "threads")
        at_least(self, 1, "distributed_timeout_minutes")
        one_of(self, "platform", ("auto", "cpu", "cuda"))
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError("name", self.name, "must be a plain folder name")
