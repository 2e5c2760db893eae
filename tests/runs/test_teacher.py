"""Which models may teach which, and how ranks share a teacher that is not of the student's shape."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken

from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.sft import TeacherConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.runs.teacher import TeacherSource, check_teacher, shared_as
from megatron_r1.sft.teacher_setup import find_sft_teacher
from tests.support.chats import small_tokenizer

TEACHER = TeacherSource("runs/teacher", "sft.teacher.from")
SOURCE = "sft.teacher.from=runs/teacher: "
SHARED = SOURCE + "must be a model that these degrees divide: "


@cache
def preset(name: str) -> ModelConfig:
    return load("pretrain", [f"model={name}"]).model


def model(name: str = "tiny", **changes: Any) -> ModelConfig:
    return replace(preset(name), **{"vocab_size": 544, **changes})


def student(name: str = "tiny", top_k: int = 64, length: int = 64, **degrees: Any) -> RunConfig:
    config = RunConfig(model=model(name, max_sequence_length=512), parallel=ParallelConfig(**degrees))
    config.train.sequence_length = length
    config.sft.teacher = TeacherConfig(from_="runs/teacher", top_k=top_k)
    return config


def check(config: RunConfig, teacher: ModelConfig, theirs: Tokenizer) -> None:
    length = "train.sequence_length", config.train.sequence_length
    check_teacher(TEACHER, config, small_tokenizer(), length, teacher, theirs)


def other_vocabulary() -> Tokenizer:
    backend = small_tokenizer().backend
    backend = type(backend).from_str(backend.to_str())
    backend.add_tokens([AddedToken("<again>")])
    return Tokenizer(backend, small_tokenizer().settings)


@pytest.mark.parametrize(
    ("config", "teacher"),
    [
        (student(), model(vocab_size=516)),
        (student(), model("tiny_dense", num_layers=6)),
        (student("tiny_dense"), model(hidden_size=96)),
        (student(expert=4, expert_tensor=2), model("tiny_dense")),
        (student(pipeline=2, pipeline_layers=[3, 1]), model(num_layers=8)),
        (student(pipeline=2), model(num_layers=5)),
    ],
)
def test_teachers_that_are_accepted(config, teacher):
    settings = {**small_tokenizer().settings, "chat_template": "", "eos_token": "<|im_end|>"}
    check(config, teacher, Tokenizer(small_tokenizer().backend, settings))


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        (student(), model(vocab_size=500), f"{SOURCE}must have the 514 tokens of its tokenizer, but has 500"),
        (student(length=512), model(), f"{SOURCE}must read train.sequence_length=512 tokens, but reads 256"),
        (
            student(pipeline=4, pipeline_layers=[1, 1, 1, 1]),
            model(num_layers=2),
            f"{SHARED}parallel.pipeline=4: must leave every stage but the last a layer of model.num_layers=2",
        ),
        (
            student(tensor=4),
            model("tiny_dense"),
            f"{SHARED}parallel.tensor=4: must divide model.attention.num_key_value_heads=2",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_refused_in_a_line(config, teacher, message):
    with pytest.raises(ConfigError) as refused:
        check(config, teacher, small_tokenizer())
    assert str(refused.value) == message


def test_a_teacher_with_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"^sft\.teacher\.from=runs/teacher: must have the student's vocabulary"):
        check(student(), model(), other_vocabulary())


def test_no_teacher_is_none_and_a_missing_one_is_refused(tmp_path):
    config = student()
    config.sft.teacher.from_ = ""
    assert find_sft_teacher(config, small_tokenizer()) is None
    config.sft.teacher.from_ = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"^sft\.teacher\.from=.*missing: must be a run with a checkpoint"):
        find_sft_teacher(config, small_tokenizer())
    with pytest.raises(ConfigError, match=r"^sft\.teacher\.top_k=515: must be at most the vocabulary of 514"):
        find_sft_teacher(student(top_k=515), small_tokenizer())


def test_a_teacher_is_shared_as_the_student_but_for_what_one_of_them_has_not():
    degrees = ParallelConfig(expert=2, pipeline=2, pipeline_layers=[3, 1])
    assert shared_as(degrees, model(), model(hidden_size=96)) == degrees
    assert shared_as(degrees, model(), model(num_layers=6)).pipeline_layers == []
    found = shared_as(degrees, model(), model("tiny_dense"))
    assert (found.expert, found.pipeline, found.pipeline_layers) == (1, 2, [3, 1])
