"""The teacher of a fine-tuning run."""

from __future__ import annotations

from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.runs.initial_weights import InitialModel
from megatron_r1.runs.teacher import TeacherSource, find_teacher, load_teacher
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.sft.teacher import DistillingReader, Teacher

KEY = "sft.teacher.from"


def find_sft_teacher(config: RunConfig, tokenizer: Tokenizer) -> InitialModel | None:
    """The configured teacher; None where there is no teacher.

    Args:
        tokenizer: the student's.

    Raises:
        ConfigError: there is no model, or it cannot teach this student.
    """
    settings, vocab_size = config.sft.teacher, tokenizer.vocab_size
    if not settings.from_:
        return None
    if settings.top_k > vocab_size:
        raise ConfigError("sft.teacher.top_k", settings.top_k, f"must be at most the vocabulary of {vocab_size}")
    length = "train.sequence_length", config.train.sequence_length
    return find_teacher(TeacherSource(settings.from_, KEY), config, tokenizer, length)


def distilling_reader(run: TrainingRun, found: InitialModel) -> DistillingReader:
    """Collective: load the teacher beside the student; returns a reader that adds the teacher's tokens to batches."""
    config, vocab_size = run.config, run.tokenizer.vocab_size
    settings = config.sft.teacher
    teacher = Teacher(load_teacher(run, found), settings.top_k, settings.temperature, vocab_size)
    padded = vocab_size < config.model.vocab_size
    return DistillingReader(
        teacher, settings, vocab_size if padded else None, config.model.mtp.num_layers, run.platform.device
    )
