"""A teacher of a run's model: found and checked before any model is built, then built beside the student."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.model.chunks import Model
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.runs.initial_weights import InitialModel, find_initial_model
from megatron_r1.runs.second_model import check_shareable, second_model
from megatron_r1.runs.training_run import TrainingRun


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher is from, and the key that says so."""

    source: str
    key: str

    def refusal(self, allowed: str) -> ConfigError:
        return ConfigError(self.key, self.source, allowed)


def find_teacher(
    teacher: TeacherSource, config: RunConfig, tokenizer: Tokenizer, length: tuple[str, int]
) -> InitialModel:
    """A teacher; raises as `find_initial_model` and `check_teacher`, whose arguments these are."""
    found = find_initial_model(teacher.source, teacher.key)
    check_teacher(teacher, config, tokenizer, length, found.model, Tokenizer.load(found.tokenizer_folder))
    return found


def check_teacher(
    teacher: TeacherSource,
    config: RunConfig,
    tokenizer: Tokenizer,
    length: tuple[str, int],
    model: ModelConfig,
    theirs: Tokenizer,
) -> None:
    """Refuse a teacher with another vocabulary or a shorter context, or that these ranks cannot divide.

    Args:
        config: the student's.
        tokenizer: the student's.
        length: tokens that the teacher must read, and the key that says so.
        model: the teacher's model.
        theirs: the teacher's tokenizer.

    Raises:
        ConfigError: names what does not fit.
    """
    if not tokenizer.has_same_vocabulary(theirs):
        raise teacher.refusal("must have the student's vocabulary: its ids stand for other tokens")
    if model.vocab_size < (vocab_size := tokenizer.vocab_size):
        raise teacher.refusal(f"must have the {vocab_size} tokens of its tokenizer, but has {model.vocab_size}")
    if model.max_sequence_length < length[1]:
        raise teacher.refusal(f"must read {length[0]}={length[1]} tokens, but reads {model.max_sequence_length}")
    degrees = shared_as(config.parallel, config.model, model)
    check_shareable(degrees, model, teacher.source, teacher.key)


def shared_as(degrees: ParallelConfig, student: ModelConfig, teacher: ModelConfig) -> ParallelConfig:
    """Degrees of parallelism of the teacher: the student's, adapted to what only one of the two models has."""
    if not teacher.moe.num_experts:
        degrees = replace(degrees, expert=1, expert_tensor=1)
    return degrees if teacher.num_layers == student.num_layers else replace(degrees, pipeline_layers=[], pipeline_layout="")


def load_teacher(run: TrainingRun, found: InitialModel) -> Model:
    """Collective: the teacher beside the student, frozen."""
    degrees = shared_as(run.config.parallel, run.config.model, found.model)
    model = second_model(found.model, degrees, run.platform, found.weights(AllRanks()).tensors)
    model.requires_grad_(False)
    model.eval()
    return model
