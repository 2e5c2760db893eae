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


GENERAL = ("name", "root")
PROCESS = ("seed", "platform", "threads", "distributed_timeout_minutes")
TRAINING = (*PROCESS, "init", "model", "fp8", "parallel", "performance", "train", "track")
CORPUS = ("data.num_documents", "data.vocab_size", "data.indexed")
PRETRAINING_SCHEDULES = (
    "model.moe.bias_update_rate",
    "model.moe.sequence_loss_coefficient",
    "model.mtp.loss_coefficient",
    "train.balance_window",
    "train.schedule.batch_ramp",
    "train.schedule.mtp_weight_phases",
    "train.schedule.bias_rate_phases",
)
"""Keys that post-training does not read: it does not balance the routers (train/routing.py, FROZEN), trains no
multi-token prediction, and has batches of one size."""

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
        reads=(*TRAINING, "data", "sft"),
        ignores=(*PRETRAINING_SCHEDULES, *CORPUS, "data.source", "data.prompts"),
    ),
    "grpo": Verb(
        "megatron_r1.commands.grpo",
        "r1_zero",
        "reinforcement learning with verifiable rewards",
        computes=True,
        needs_model=True,
        reads=(*TRAINING, "data", "rollout", "reward", "rl"),
        ignores=(
            *PRETRAINING_SCHEDULES,
            *CORPUS,
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
        reads=(*TRAINING, "data", "reward_model"),
        ignores=(*PRETRAINING_SCHEDULES, *CORPUS, "data.source", "data.prompts", "data.reasoning_gym_share"),
    ),
    "dpo": Verb(
        "megatron_r1.commands.dpo",
        "dpo",
        "direct preference optimization on pairs of responses",
        computes=True,
        needs_model=True,
        reads=(*TRAINING, "data", "dpo", "rollout.chat_template", "rollout.system_prompt"),
        ignores=(*PRETRAINING_SCHEDULES, *CORPUS, "data.source", "data.prompts", "data.reasoning_gym_share"),
    ),
    "evaluate": Verb(
        "megatron_r1.commands.evaluate",
        "evaluate",
        "held-out accuracy of one model or several",
        computes=True,
        reads=(*PROCESS, "init", "data", "rollout", "evaluate"),
        ignores=(*CORPUS, "data.source", "data.prompts", "rollout.temperature", "rollout.max_staleness"),
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
        ignores=PRETRAINING_SCHEDULES,
    ),
    "pipeline": Verb(
        "megatron_r1.commands.pipeline",
        "quickstart",
        "a recipe of several stages, resumable",
        reads=("seed", "platform", "parallel", "pipeline"),
    ),
    "report": Verb("megatron_r1.commands.report", "report", "report.html of the runs in a folder"),
    "doctor": Verb(
        "megatron_r1.commands.doctor", "doctor", "what this machine can run, and what is missing", reads=("platform",)
    ),
}
