"""The teacher of a fine-tuning run: found and checked before any model is built, then built beside the student."""

from __future__ import annotations

from dataclasses import replace

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.runs.initial_weights import Weights, find_weights
from megatron_r1.runs.second_model import check_shareable, second_model
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.sft.teacher import DistillingReader, Teacher

KEY = "sft.teacher.from"


def find_teacher(config: RunConfig, tokenizer: Tokenizer) -> Weights | None:
    """The weights of the configured teacher; None where there is no teacher.

    Args:
        tokenizer: the student's.

    Raises:
        ConfigError: there is no model, or it cannot teach this student.
    """
    source = config.sft.teacher.from_
    if not source:
        return None
    found = find_weights(source, KEY)
    check_teacher(config, tokenizer, found.model, Tokenizer.load(found.tokenizer_folder))
    return found


def check_teacher(config: RunConfig, tokenizer: Tokenizer, teacher: ModelConfig, theirs: Tokenizer) -> None:
    """Refuse a teacher with another vocabulary or a shorter context, or that these ranks cannot divide.

    Raises:
        ConfigError: names what does not fit.
    """
    source, vocab_size, length = config.sft.teacher.from_, tokenizer.vocab_size, config.train.sequence_length
    if not tokenizer.has_same_vocabulary(theirs):
        raise ConfigError(KEY, source, "must have the student's vocabulary: its ids stand for other tokens")
    if teacher.vocab_size < vocab_size:
        raise ConfigError(
            KEY, source, f"must have the {vocab_size} tokens of its tokenizer, but has {teacher.vocab_size}"
        )
    if config.sft.teacher.top_k > vocab_size:
        raise ConfigError(
            "sft.teacher.top_k", config.sft.teacher.top_k, f"must be at most the vocabulary of {vocab_size}"
        )
    if teacher.max_sequence_length < length:
        allowed = f"must read train.sequence_length={length} tokens, but reads {teacher.max_sequence_length}"
        raise ConfigError(KEY, source, allowed)
    degrees = shared_as(config.parallel, config.model, teacher)
    if not degrees.pipeline_layers and teacher.num_layers % degrees.stages:
        allowed = (
            f"must have a multiple of {degrees.stages} layers, one share for each stage, but has {teacher.num_layers}"
        )
        raise ConfigError(KEY, source, allowed)
    check_shareable(degrees, teacher, source, KEY)


def shared_as(degrees: ParallelConfig, student: ModelConfig, teacher: ModelConfig) -> ParallelConfig:
    """Degrees of parallelism of the teacher: the student's, adapted to what only one of the two models has."""
    if not teacher.moe.num_experts:
        degrees = replace(degrees, expert=1, expert_tensor=1)
    return degrees if teacher.num_layers == student.num_layers else replace(degrees, pipeline_layers=[])


def distilling_reader(run: TrainingRun, found: Weights) -> DistillingReader:
    """Collective: load the teacher beside the student; returns a reader that adds the teacher's tokens to batches."""
    config, vocab_size = run.config, run.tokenizer.vocab_size
    settings, degrees = config.sft.teacher, shared_as(config.parallel, config.model, found.model)
    model = second_model(found.model, degrees, run.platform, found.tensors)
    teacher = Teacher(model, settings.top_k, settings.temperature, vocab_size)
    padded = vocab_size < config.model.vocab_size
    return DistillingReader(
        teacher, settings, vocab_size if padded else None, config.model.mtp.num_layers, run.platform.device
    )
