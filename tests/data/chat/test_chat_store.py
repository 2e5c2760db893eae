"""Rows of every kind of file become examples once; bad rows are listed, counted and limited."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.sft import ConversationsConfig, SftConfig
from megatron_r1.data.chat.encode import template_source
from megatron_r1.data.chat.store import TEMPLATE_KEY, Examples, _Maker, open_examples
from megatron_r1.data.row_files import rows_of
from megatron_r1.data.synthetic.expressions import in_eval_split, normalise
from megatron_r1.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from megatron_r1.errors import ConfigError, DataError
from tests.support.chats import SEVERAL, SINGLE, small_tokenizer

TOKENIZER = small_tokenizer()
QUESTION = re.compile(r"\d+(?: *[-+*] *\d+)+")
LONGEST = 64
ROWS = [{"prompt": f"What is {n} + 1?", "response": f"{n + 1}"} for n in range(20)] + [{"messages": SEVERAL}]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def settings(path: Path, **changes) -> SftConfig:
    source = ConversationsConfig(path=str(path), split=changes.pop("split", "train"))
    common = {"source": "files", "datasets": {"a": source}, "chat_template": "tokenizer", "eval_examples": 0}
    return SftConfig(**{**common, **changes})


def opened(config: SftConfig, run: Path, length: int = LONGEST, seed: int = 0) -> Examples:
    run.mkdir(exist_ok=True)
    return open_examples(config, DataConfig(num_documents=200), TOKENIZER, length, seed, run)


def texts(examples: Examples, evaluation: bool | None = None) -> list[str]:
    ends = np.cumsum(examples.lengths_N)
    return [
        TOKENIZER.decode(examples.tokens_T[end - length : end])
        for end, length, out in zip(ends, examples.lengths_N, examples.eval_N, strict=True)
        if evaluation in (None, bool(out))
    ]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{"messages": [*SINGLE]} for _ in range(3)] + [{"messages": SEVERAL}])
    jsonl(tmp_path / "a.jsonl", list(table))
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "splits")
    (tmp_path / "repository/data").mkdir(parents=True)
    table.to_parquet(tmp_path / "repository/data/train-00000-of-00001.parquet")
    table.select([0]).to_parquet(tmp_path / "repository/data/test-00000-of-00001.parquet")
    named = ("a.jsonl", "a.parquet", "saved", "splits", "repository")
    found = {name: opened(settings(tmp_path / name), tmp_path / f"run-{name}") for name in named}
    for name in named:
        assert texts(found[name]) == texts(found["a.jsonl"]) and found[name].counts["examples"] == 4
        assert np.array_equal(found[name].loss_mask_T, found["a.jsonl"].loss_mask_T)
    assert opened(settings(tmp_path / "splits", split="test"), tmp_path / "run-t").counts["rows"] == 1
    with pytest.raises(ConfigError, match=r"^sft\.datasets\.a\.split=dev: must be one of train, test$"):
        opened(settings(tmp_path / "splits", split="dev"), tmp_path / "run-d")


@pytest.mark.parametrize("name", ["a.txt", "gone.jsonl", "empty"])
def test_sources_that_are_none_are_refused_by_their_key(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^sft\.datasets\.a\.path=.*: [a-z]"):
        opened(settings(tmp_path / name), tmp_path / "run")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_that_is_cut_is_an_error_of_one_line(tmp_path, suffix):
    from datasets import Dataset

    table = Dataset.from_list(ROWS[:20])
    table.to_parquet(tmp_path / "whole.parquet") if suffix == "parquet" else table.save_to_disk(tmp_path / "saved")
    whole = tmp_path / "whole.parquet" if suffix == "parquet" else next((tmp_path / "saved").glob("*.arrow"))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match="is not a whole") as error:
        list(rows_of([whole]))
    assert "\n" not in str(error.value)


BROKEN = {3: "{not json", 5: "[]", 8: '{"prompt": "a"}', 11: '{"prompt": "<|eos|>", "response": "b"}'}


def broken(path: Path) -> Path:
    rows: list = list(ROWS)
    for number, line in BROKEN.items():
        rows.insert(number - 1, line)
    return jsonl(path, rows)


def test_bad_rows_are_quarantined_by_file_and_line(tmp_path):
    path = broken(tmp_path / "a.jsonl")
    examples = opened(settings(path, max_bad_rows=4), tmp_path / "run")
    assert (examples.counts["rows"], examples.counts["bad_rows"], examples.counts["examples"]) == (25, 4, 21)
    named = (tmp_path / "run/bad_rows.txt").read_text().splitlines()
    assert sorted(int(line.removeprefix(f"{path}:").split(":")[0]) for line in named) == [*BROKEN]
    assert any(line.startswith(f"{path}:3: is not JSON (") for line in named)
    assert (
        f"{path}:5: is not a JSON object" in named and f"{path}:11: message 1 holds the control token <|eos|>" in named
    )


@pytest.mark.parametrize(("changes", "allowed"), [({"max_bad_rows": 3}, 3), ({"max_bad_share": 0.13}, 3), ({}, 0)])
def test_more_bad_rows_than_allowed_refuse_the_run(tmp_path, changes, allowed):
    path = broken(tmp_path / "a.jsonl")
    with pytest.raises(
        DataError, match=rf"^4 of 25 rows are bad and {allowed} may be .*; the first: {path}:3: "
    ) as error:
        opened(settings(path, **changes), tmp_path / "run")
    assert not list((tmp_path / "run/data").glob("examples-*"))
    assert "\n" not in str(error.value) and len((tmp_path / "run/bad_rows.txt").read_text().splitlines()) == 4
    assert opened(settings(path, max_bad_share=0.16), tmp_path / "run").counts["bad_rows"] == 4


def test_what_is_too_long_is_dropped_or_cut_and_counted(tmp_path):
    long = {"prompt": "a", "response": "b " * 100}
    hopeless = {"prompt": "a " * 100, "response": "b"}
    path = jsonl(tmp_path / "a.jsonl", [*ROWS[:3], long, hopeless])
    dropped = opened(settings(path), tmp_path / "dropped", length=20)
    cut = opened(settings(path, overlong="truncate"), tmp_path / "cut", length=20)
    assert (dropped.counts["examples"], dropped.counts["dropped_too_long"]) == (3, 2)
    assert (cut.counts["examples"], cut.counts["truncated"], cut.counts["dropped_too_long"]) == (4, 1, 1)
    assert cut.lengths_N.max() == 21 and cut.loss_mask_T[-1] and cut.tokens_T[-1] != TOKENIZER.eos


def test_held_out_conversations_are_on_one_side_with_all_that_equal_them(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, *ROWS])
    examples = opened(settings(path, eval_examples=5, loss_on="each"), tmp_path / "run")
    measured, training = set(texts(examples, True)), set(texts(examples, False))
    # The conversation of several turns makes two examples.
    assert len(measured) in (5, 6) and measured.isdisjoint(training) and len(measured | training) == 22
    other = opened(settings(path, eval_examples=5, loss_on="each"), tmp_path / "other", seed=1)
    assert set(texts(other, True)) != measured


def test_the_arithmetic_world_holds_out_its_own_expressions(tmp_path):
    config = SftConfig(num_conversations=200, eval_examples=30)
    examples = opened(config, tmp_path / "run", length=128)
    assert examples.counts["examples"] == 230 and examples.eval_N.sum() == 30
    for text in texts(examples):
        assert text.startswith("<|bos|>A conversation") and text.endswith("</answer><|eos|>") and "<think>" in text
    for evaluation in (False, True):
        for text in texts(examples, evaluation):
            [expression] = {"".join(found.split()) for found in QUESTION.findall(text.split("User: ")[1])[:1]}
            assert in_eval_split(normalise(expression), DataConfig().eval_fraction) is evaluation


def test_a_run_resumes_with_the_same_examples_or_is_refused(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    config = settings(path)
    first = opened(config, tmp_path / "run")
    monkeypatch.setattr(_Maker, "make", lambda *_: pytest.fail("made again"))
    assert texts(opened(config, tmp_path / "run")) == texts(first)
    monkeypatch.undo()
    path.touch()  # the same content at another time is the same
    assert texts(opened(config, tmp_path / "run")) == texts(first)
    jsonl(path, ROWS[1:])
    with pytest.raises(DataError, match="run: its conversations changed"):
        opened(config, tmp_path / "run")


def test_several_processes_at_once_make_the_examples_once(tmp_path, monkeypatch):
    config, made = settings(jsonl(tmp_path / "a.jsonl", ROWS)), []
    make = _Maker.make

    def slow_make(self, *args):
        made.append(1)
        time.sleep(0.2)
        return make(self, *args)

    monkeypatch.setattr(_Maker, "make", slow_make)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opened(config, tmp_path / "run"), range(4)))
    assert made == [1] and all(texts(examples) == texts(found[0]) for examples in found)


def test_templates_come_from_the_tokenizer_or_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert template_source(str(tmp_path / "t.jinja"), TOKENIZER, TEMPLATE_KEY) == "{{ messages }}"
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    named = Tokenizer(TOKENIZER.backend, {**TOKENIZER.settings, "chat_template": several})
    assert template_source("tokenizer", named, TEMPLATE_KEY) == "y"
    bare = Tokenizer(TOKENIZER.backend, {k: v for k, v in TOKENIZER.settings.items() if k != "chat_template"})
    with pytest.raises(ConfigError, match=r"^sft\.chat_template=tokenizer: the tokenizer has no chat template"):
        template_source("tokenizer", bare, TEMPLATE_KEY)
    with pytest.raises(ConfigError, match=r"^sft\.chat_template=gone: must be"):
        template_source("gone", bare, TEMPLATE_KEY)
    bare.save(tmp_path / "folder")
    (tmp_path / "folder/chat_template.jinja").write_text("z")
    assert template_source("tokenizer", Tokenizer.load(tmp_path / "folder"), TEMPLATE_KEY) == "z"


def test_a_date_is_pinned_with_the_examples_of_a_run(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf{{ strftime_now('%Y') }} " + CHAT_TEMPLATE.encode())
    dated = {"chat_template": str(tmp_path / "t.jinja"), "template_date": "1999-12-31"}
    assert all(text.startswith("1999 <|bos|>") for text in texts(opened(settings(path, **dated), tmp_path / "run")))
    with pytest.raises(DataError, match="run: its conversations changed"):
        opened(settings(path, **{**dated, "template_date": "2001-01-01"}), tmp_path / "run")
    with pytest.raises(DataError, match="^chat template .*t.jinja: needs a date"):
        opened(settings(path, chat_template=dated["chat_template"]), tmp_path / "other")


def test_messages_are_learned_as_their_rows_say(tmp_path):
    """`weight` and unknown fields, from a table too, where every message has every field."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"messages": [SINGLE[0], {**SINGLE[1], "weight": 0}, SINGLE[0], {**SINGLE[1], "content": "6", "weight": 1}]},
        {"messages": [SINGLE[0], {**SINGLE[1], "mask": 1}]},
    ]
    jsonl(tmp_path / "a.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        examples = opened(settings(tmp_path / name, max_bad_rows=1), tmp_path / f"run-{name}")
        assert TOKENIZER.decode(examples.tokens_T[examples.loss_mask_T]) == "6<|eos|>"
        bad = (tmp_path / f"run-{name}/bad_rows.txt").read_text()
        assert bad == f"{tmp_path}/{name}:2: message 2 has the field mask, which the chat template does not read\n"
