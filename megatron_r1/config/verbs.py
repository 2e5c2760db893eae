"""The verbs of the command line: what each does, its module, the recipe it starts from and the keys that it reads.

`reads` and `ignores` are sections or keys; the longest that fits a key decides. tests/config/test_verb_keys.py holds
them against the code.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb."""

    module: str
    """Module with `run(config: RunConfig) -> None`; imported only once the configuration is valid."""
    recipe: str
    """Recipe in configs/ without --config-name."""
    summary: str
    """One line of help."""
    computes: bool = False
    """Whether it runs the model, so that the platform must be ready before its module is imported."""
    needs_model: bool = False
    """Whether `init.from` must name a model to start from."""
    reads: tuple[str, ...] = ()
    """Sections and keys that it reads, beside `GENERAL`."""
    ignores: tuple[str, ...] = ()
    """Exceptions: sections and keys within `reads` that it does not read."""
    short_forms: tuple[tuple[str, str], ...] = ()
    """Names that the command line takes for keys: (short form, key)."""
    of_command: bool = False
    """Whether it takes another verb's command, as in `check grpo key=value`; its module then has
    `run_command(command: JobCommand) -> int` instead, which returns the exit status."""

    def check(self, name: str, source: str) -> None:
        """Refuse to start without a model.

        Args:
            name: of this verb.
            source: value of `init.from`.

        Raises:
            ConfigError: the verb needs a model and `source` is empty.
        """
        if self.needs_model and not source:
            raise ConfigError("init.from", source, f"{name} needs a model: a run, a checkpoint or hf:FOLDER")


@dataclass(frozen=True, slots=True)
class JobCommand:
    """The command of a job that another verb handles: checks or submits."""

    verb: str
    """A key of VERBS."""
    recipe: str
    """Name of its recipe, without `.yaml`."""
    overrides: tuple[str, ...] = ()
    """key=value, keys of the handling verb among them."""


GENERAL = ("name", "root")
PROCESS = ("seed", "platform", "threads", "distributed_timeout_minutes")
TRAINING = (*PROCESS, "init", "model", "fp8", "parallel", "performance", "train", "watch", "track", "profile")
CORPUS = ("data.num_documents", "data.vocab_size", "data.indexed")
PRETRAINING_SCHEDULES = (
    "model.moe.bias_update_rate",
    "model.moe.sequence_loss_coefficient",
    "train.balance_window",
    "train.schedule.batch_ramp",
    "train.schedule.mtp_weight_phases",
    "train.schedule.bias_rate_phases",
)
"""Keys that post-training does not read: `routing` says what it does with the routers, sft alone trains multi-token
prediction, and batches have one size."""
POST_TRAINING = (*TRAINING, "routing")
REWINDS = ("watch.max_rewinds", "watch.rewind_after_spikes", "watch.rewind_margin_steps")
MTP_WEIGHT = "model.mtp.loss_coefficient"
"""Read where multi-token layers are trained: pretrain and sft."""

VERBS = {
    "pretrain": Verb(
        "megatron_r1.commands.pretrain",
        "pretrain",
        "train a base model on text",
        computes=True,
        reads=(*TRAINING, "data"),
        ignores=("data.prompts",),
    ),
    "sft": Verb(
        "megatron_r1.commands.sft",
        "sft",
        "supervised fine-tuning on conversations",
        computes=True,
        needs_model=True,
        reads=(*POST_TRAINING, "data", "sft"),
        ignores=(*PRETRAINING_SCHEDULES, *CORPUS, "data.source", "data.prompts"),
    ),
    "grpo": Verb(
        "megatron_r1.commands.grpo",
        "r1_zero",
        "reinforcement learning with verifiable rewards",
        computes=True,
        needs_model=True,
        reads=(*POST_TRAINING, "data", "rollout", "reward", "rl"),
        ignores=(
            *PRETRAINING_SCHEDULES,
            MTP_WEIGHT,
            *CORPUS,
            *REWINDS,
            "train.micro_batch_size",
            "train.sequence_length",
            "train.global_batch_size",
        ),
    ),
    "reward_model": Verb(
        "megatron_r1.commands.reward_model",
        "reward_helpfulness",
        "train a reward model on labelled responses",
        computes=True,
        needs_model=True,
        reads=(*POST_TRAINING, "data", "reward_model"),
        ignores=(
            *PRETRAINING_SCHEDULES,
            MTP_WEIGHT,
            *CORPUS,
            "data.source",
            "data.prompts",
            "data.reasoning_gym_share",
        ),
    ),
    "dpo": Verb(
        "megatron_r1.commands.dpo",
        "dpo",
        "direct preference optimization on pairs of responses",
        computes=True,
        needs_model=True,
        reads=(*POST_TRAINING, "data", "dpo", "rollout.chat_template", "rollout.system_prompt"),
        ignores=(
            *PRETRAINING_SCHEDULES,
            MTP_WEIGHT,
            *CORPUS,
            "data.source",
            "data.prompts",
            "data.reasoning_gym_share",
        ),
    ),
    "evaluate": Verb(
        "megatron_r1.commands.evaluate",
        "evaluate",
        "held-out accuracy of one model or several",
        computes=True,
        reads=(*PROCESS, "init", "data", "rollout", "evaluate", "reward.verifier", "reward.math", "reward.sandbox"),
        ignores=(*CORPUS, "data.source", "rollout.temperature", "rollout.max_staleness"),
    ),
    "sample": Verb(
        "megatron_r1.commands.sample",
        "sample",
        "scored responses to a file of prompts",
        computes=True,
        needs_model=True,
        reads=(*PROCESS, "init", "data", "rollout", "reward", "sample"),
        ignores=(*CORPUS, "rollout.max_staleness"),
    ),
    "curate": Verb(
        "megatron_r1.commands.curate",
        "curate",
        "filter and mix generated data for training",
        reads=(
            "seed",
            "curate",
            "data.eval_fraction",
            "reward.verifier",
            "reward.answer_format",
            "reward.math",
            "reward.sandbox",
            "reward.judge",
            "reward.judge_config",
        ),
    ),
    "diagnose": Verb(
        "megatron_r1.commands.diagnose",
        "diagnose",
        "why a run's engine and trainer disagree",
        computes=True,
        reads=(*PROCESS, "init.from", "parallel", "diagnose", "rollout.temperature", "rl.tokens_per_micro_batch"),
    ),
    "convert": Verb(
        "megatron_r1.commands.convert",
        "convert",
        "between checkpoints and Hugging Face folders, BF16 or FP8",
        reads=("init", "model", "convert"),
        ignores=(*PRETRAINING_SCHEDULES, MTP_WEIGHT),
    ),
    "average": Verb(
        "megatron_r1.commands.average",
        "average",
        "the mean of the weights of several runs",
        reads=("average",),
    ),
    "pipeline": Verb(
        "megatron_r1.commands.pipeline",
        "quickstart",
        "a recipe of several stages, resumable",
        reads=("seed", "platform", "parallel", "pipeline", "track", "rollout.sglang.slurm"),
        short_forms=tuple((name, f"pipeline.{name}") for name in ("from", "until", "only", "dry_run", "show")),
    ),
    "submit": Verb(
        "megatron_r1.commands.submit",
        "submit",
        "a verb as a SLURM job: submit VERB [key=value ...]",
        reads=("cluster", "submit"),
        short_forms=tuple(
            (name, f"submit.{name}") for name in ("nodes", "engine_nodes", "time_limit", "restart", "dry_run")
        ),
        of_command=True,
    ),
    "serve": Verb(
        "megatron_r1.commands.serve",
        "serve",
        "the servers of a command on this node of its SLURM job: serve VERB [key=value ...]",
        of_command=True,
    ),
    "report": Verb("megatron_r1.commands.report", "report", "report.html of the runs in a folder"),
    "track sync": Verb(
        "megatron_r1.commands.track_sync", "track_sync", "upload the offline wandb runs below root=FOLDER"
    ),
    "doctor": Verb(
        "megatron_r1.commands.doctor", "doctor", "what this machine can run, and what is missing", reads=("platform",)
    ),
    "check": Verb(
        "megatron_r1.commands.check",
        "check",
        "whether a job can run, before it queues: check VERB key=value",
        reads=("check",),
        of_command=True,
    ),
    "plan": Verb(
        "megatron_r1.commands.plan",
        "plan",
        "layout, memory, time and cost of a job: plan VERB [key=value ...]",
        reads=("plan",),
        short_forms=tuple((name, f"plan.{name}") for name in ("gpu", "gpus")),
        of_command=True,
    ),
}
