"""The verbs of the command line: what each does, which module does it, which recipe it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb."""

    module: str
    """Module with `run(config: RunConfig) -> None`; imported only once the configuration is valid."""
    recipe: str
    """Recipe in configs/ that is taken without --config-name."""
    summary: str
    """One line of help."""
    computes: bool = False
    """Whether it runs the model, so that the platform must be ready before its module is imported."""
    needs_model: bool = False
    """Whether `init.from` must name a model to start from."""

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


VERBS = {
    "pretrain": Verb("megatron_r1.commands.pretrain", "pretrain", "train a base model on text", True),
    "sft": Verb("megatron_r1.commands.sft", "sft", "supervised fine-tuning on conversations", True, True),
    "grpo": Verb("megatron_r1.commands.grpo", "r1_zero", "reinforcement learning with verifiable rewards", True, True),
    "reward_model": Verb(
        "megatron_r1.commands.reward_model", "reward_helpfulness", "train a reward model on judged answers", True, True
    ),
    "dpo": Verb("megatron_r1.commands.dpo", "dpo", "direct preference optimization on pairs of answers", True, True),
    "evaluate": Verb("megatron_r1.commands.evaluate", "evaluate", "held-out accuracy of one model or several", True),
    "sample": Verb("megatron_r1.commands.sample", "sample", "scored answers to a file of prompts", True, True),
    "diagnose": Verb("megatron_r1.commands.diagnose", "diagnose", "why a run's engine and trainer disagree", True),
    "convert": Verb(
        "megatron_r1.commands.convert", "convert", "between checkpoints and Hugging Face folders, BF16 or FP8"
    ),
    "pipeline": Verb("megatron_r1.commands.pipeline", "quickstart", "a recipe of several stages, resumable"),
    "report": Verb("megatron_r1.commands.report", "report", "report.html of the runs in a folder"),
    "doctor": Verb("megatron_r1.commands.doctor", "doctor", "what this machine can run, and what is missing"),
}
