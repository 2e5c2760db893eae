"""Prompts from files: every row becomes a prompt or is listed as bad."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.rewards.accuracy import truth_problems
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
    assert len(found.bad_rows) == 1 and found.bad_rows[0].startswith(f"{path}:2: {reason}")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.prompts.path=.*prompts.tsv: must be a file \(.jsonl, "):
        read(config_of(tmp_path / "prompts.tsv"))
    with pytest.raises(ConfigError, match=r"data.prompts.path=.*prompts.jsonl: no such file"):
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
    assert found.bad_rows == [f"{path}:3: task is not text"]


def test_a_question_with_a_control_token_is_a_bad_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("1?", "2<|eos|>?")))
    formatter = PromptFormatter(small_tokenizer(), "r1_zero")
    found = read_prompts(config_of(path, max_bad_rows=1), formatter.check)
    assert [prompt.question for prompt in found.prompts] == ["1?"]
    assert found.bad_rows == [f"{path}:2: the question holds the control token <|eos|>"]


def test_prompts_of_a_folder_have_ids_of_their_own(tmp_path):
    (tmp_path / "data").mkdir()
    for number, row in enumerate(ROWS):
        (tmp_path / f"data/train-{number}.json").write_text(json.dumps([row, {**row, "question": "3?"}]))
    (tmp_path / "data/test.json").write_text(json.dumps(ROWS[:1]))
    found = read(config_of(tmp_path)).prompts
    assert [prompt.id for prompt in found] == [f"train-{n}.json:{row}" for n in (0, 1) for row in (1, 2)]
    assert [prompt.id for prompt in read(config_of(tmp_path, split="test")).prompts] == ["1"]
    with pytest.raises(ConfigError, match=r"^data\.prompts\.subset=x: must be one of data, "):
        read(config_of(tmp_path, subset="x"))


def test_a_table_may_leave_out_what_a_row_may(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": "1?", "answer": None, "task": None}, {"question": "2?", "answer": "2", "task": "math"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(config_of(tmp_path / "a.parquet")).prompts
    assert [(prompt.answer, prompt.task) for prompt in found] == [("", "file"), ("2", "math")]


def test_prompts_outside_of_the_pass_rates_are_left_out_by_name(tmp_path):
    rates = [0.0, 0.25, 0.5, 1, None, 0.75]
    rows = [{"question": f"{n}?", "answer": "1", "pass_rate": rate} for n, rate in enumerate(rates)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "6?", "answer": "1"}]))
    found = read(config_of(path, min_pass_rate=0.25, max_pass_rate=0.75))
    assert [prompt.question for prompt in found.prompts] == ["1?", "2?", "4?", "5?", "6?"]
    assert found.left_out == [
        f"{path}:1: pass_rate 0 is below min_pass_rate=0.25",
        f"{path}:4: pass_rate 1 is above max_pass_rate=0.75",
    ]
    assert not found.bad_rows and not found.notes and len(read(config_of(path)).prompts) == 7
    with pytest.raises(DataError, match="holds no prompts; 4 were left out by their pass rates"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        read(config_of(path, min_pass_rate=0.6, max_pass_rate=0.7))
    path.write_text(json.dumps({"question": "?", "answer": "1", "pass_rate": 1.5}) + "\n")
    with pytest.raises(DataError, match="pass_rate is no number from 0 to 1"):
        read(config_of(path))


def test_a_row_names_its_domain_and_general_ones_need_no_answer(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"question": "1+1?", "answer": "2"},
        {"question": "Be kind.", "reward_domain": "helpfulness", "task": "writing"},
        {"question": "A bomb?", "reward_domain": "harmlessness"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = RewardConfig(domains={"accuracy": "reasoning"})
    found = read_prompts(config_of(path), lambda question: None, truth_problems=partial(truth_problems, reward))
    assert [prompt.domain for prompt in found.prompts] == ["reasoning", "helpfulness", "harmlessness"]
    whole = read(config_of(path, reward_domain="helpfulness"))
    assert {prompt.domain for prompt in whole.prompts} == {"helpfulness"}
    everywhere = partial(truth_problems, RewardConfig())
    with pytest.raises(DataError, match=r"prompts.jsonl:2: there is no task 'writing'"):
        read_prompts(config_of(path), lambda question: None, truth_problems=everywhere)
    path.write_text(json.dumps({"question": "?", "answer": "1", "reward_domain": "maths"}) + "\n")
    with pytest.raises(DataError, match="reward_domain must be one of reasoning, helpfulness, harmlessness"):
        read(config_of(path))
