"""One run: every section together."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.data import DataConfig
from megatron_r1.config.dpo import DpoConfig
from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.config.jobs import DiagnoseConfig, EvaluateConfig, SampleConfig, TrackConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.sft import SftConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """Where the first weights come from."""

    from_: str = ""
    """Run directory, checkpoint directory or hf:FOLDER; empty initialises at random. Written `init.from`."""
    weights: str = "model"
    """Of checkpoints, here and in evaluate.models: model, or ema, the moving average of the weights."""

    def __post_init__(self) -> None:
        one_of(self, "weights", ("model", "ema"))


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that one command needs to know."""

    name: str = "run"
    """Name of the run; its directory is ROOT/NAME."""
    root: str = "runs"
    """Folder that holds run directories."""
    seed: int = 0
    """Seed of initial weights, data order and sampling."""
    platform: str = "auto"
    """cuda, cpu, or auto (refused inside a SLURM job)."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores among the ranks."""
    distributed_timeout_minutes: int = 120
    """Minutes after which a collective operation that some rank has not joined ends the run. Ranks wait in one for the
    slowest: for rank 0 while it generates, scores or saves, for all ranks while servers load weights.
    It must be longer than the longest of these; where a rank dies, the launcher notices at once, whatever this says."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """In which number format linear layers multiply."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    """Recomputation, overlap and fusion."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the model reads."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How parameters are updated."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How answers are sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What an answer is worth."""
    rl: RLConfig = field(default_factory=RLConfig)
    """The reinforcement-learning objective."""
    sft: SftConfig = field(default_factory=SftConfig)
    """What supervised fine-tuning learns from."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """What a reward model learns from."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """What direct preference optimization learns from."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How a model is measured."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """What a sampling job answers, and how it is written."""
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    """Which saved batch a diagnosis looks at."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Where metrics go."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where the first weights come from."""
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    """What convert makes of them."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Stages of a recipe."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "threads")
        at_least(self, 1, "distributed_timeout_minutes")
        one_of(self, "platform", ("auto", "cpu", "cuda"))
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError("name", self.name, "must be a plain folder name")
