"""The verbs of the command line: what each does, which module does it, which recipe it starts from."""

from __future__ import annotations

from dataclasses import dataclass


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


VERBS = {
    "pretrain": Verb("megatron_r1.commands.pretrain", "pretrain", "train a base model on text", True),
    "sft": Verb("megatron_r1.commands.sft", "sft", "supervised fine-tuning on conversations", True),
    "grpo": Verb("megatron_r1.commands.grpo", "r1_zero", "reinforcement learning with verifiable rewards", True),
    "reward_model": Verb(
        "megatron_r1.commands.reward_model", "reward_helpfulness", "train a reward model on judged answers", True
    ),
    "dpo": Verb("megatron_r1.commands.dpo", "dpo", "direct preference optimization on pairs of answers", True),
    "evaluate": Verb("megatron_r1.commands.evaluate", "evaluate", "held-out accuracy of one model or several", True),
    "sample": Verb("megatron_r1.commands.sample", "sample", "scored answers to a file of prompts", True),
    "diagnose": Verb("megatron_r1.commands.diagnose", "diagnose", "why a run's engine and trainer disagree", True),
    "convert": Verb(
        "megatron_r1.commands.convert", "convert", "between checkpoints and Hugging Face folders, BF16 or FP8"
    ),
    "pipeline": Verb("megatron_r1.commands.pipeline", "quickstart", "a recipe of several stages, resumable"),
    "report": Verb("megatron_r1.commands.report", "report", "report.html of the runs in a folder"),
    "doctor": Verb("megatron_r1.commands.doctor", "doctor", "what this machine can run, and what is missing"),
}
