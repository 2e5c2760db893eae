"""Prompts from files: every row becomes a prompt or is listed as bad."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.errors import ConfigError, DataError
from tests.support.chats import small_tokenizer

ROWS: list[dict[str, Any]] = [
    {"question": "1+1?", "answer": "2", "name": "a"},
    {"question": "2+2?", "answer": 4, "name": "b"},
]


def config_of(path, **changes) -> PromptsConfig:
    return PromptsConfig(path=str(path), **changes)


def read(config: PromptsConfig, limit: int = 0) -> PromptFile:
    return read_prompts(config, lambda question: None, limit)


@pytest.fixture(params=["jsonl", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"prompts.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        import pyarrow
        from pyarrow import parquet

        rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_become_prompts(file):
    found = read(config_of(file))
    assert [(p.id, p.question, p.answer, p.task) for p in found.prompts] == [
        ("1", "1+1?", "2", "file"),
        ("2", "2+2?", "4", "file"),
    ]
    assert not found.bad_rows


def test_fields_and_limit(file):
    (prompt,) = read(config_of(file, id_field="name", question_field="name"), limit=1).prompts
    assert (prompt.id, prompt.question) == ("a", "a")


BAD = [
    ("{", "is not JSON"),
    ("[1]", "is not a JSON object"),
    ('{"answer": "1"}', "question is not text"),
    ('{"question": "  "}', "question is not text"),
    ('{"question": "1?", "answer": [1]}', "answer is neither text nor a number"),
    ('{"question": "1?", "name": "a"}', "name a is not unique"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_rows_are_named(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(ROWS[0]) + f"\n{line}\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(DataError, match=f"prompts.jsonl:2: {reason}.*max_bad_rows=0"):
        read(config_of(path, id_field="name"))
    found = read(config_of(path, id_field="name", max_bad_rows=1))
    assert [prompt.id for prompt in found.prompts] == ["a", "b"]
    assert len(found.bad_rows) == 1 and found.bad_rows[0].startswith(f"prompts.jsonl:2: {reason}")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in .jsonl or .parquet"):
        config_of(tmp_path / "prompts.csv")
    with pytest.raises(ConfigError, match=r"data.prompts.path=.*prompts.jsonl: there is no such file"):
        read(config_of(tmp_path / "prompts.jsonl"))
    for name, content in (("prompts.jsonl", ""), ("prompts.parquet", "no parquet")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="holds no prompts|is not a Parquet file"):
            read(config_of(tmp_path / name))


def test_rows_may_name_their_verifier(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": "2^8?", "task": "math"}, {"question": "1?"}, {"question": "2?", "task": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(config_of(path, max_bad_rows=1))
    assert [prompt.task for prompt in found.prompts] == ["math", "file"]
    assert found.bad_rows == ["prompts.jsonl:3: task is not text"]


def test_a_question_with_a_control_token_is_a_bad_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("1?", "2<|eos|>?")))
    formatter = PromptFormatter(small_tokenizer(), "r1_zero")
    found = read_prompts(config_of(path, max_bad_rows=1), formatter.check)
    assert [prompt.question for prompt in found.prompts] == ["1?"]
    assert found.bad_rows == ["prompts.jsonl:2: the question holds the control token <|eos|>"]
