"""Labelled responses as sequences of tokens, from files, and in the order of epochs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_r1.config.data import DataConfig
from megatron_r1.data.preference.examples import (
    PreferenceDataset,
    RewardModelEncoder,
    TokenizedPreference,
    TokenizedSequence,
    encode_preferences,
    read_preferences,
)
from megatron_r1.data.preference.length_baseline import length_baseline
from megatron_r1.data.preference_example import LabelledResponse, PreferenceExample
from megatron_r1.data.row_sources import RowSource
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError

PAIR = PreferenceExample(
    "t",
    LabelledResponse("2 + 3", "<think>x</think>5", "\nright"),
    LabelledResponse("2 + 3", "<think>x</think>6", "\nwrong"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DataConfig(num_documents=500))


def encoder(tokenizer: Tokenizer, reasoning: bool) -> RewardModelEncoder:
    return RewardModelEncoder(tokenizer, lambda q: f"Q: {q}\nA: ", lambda r: r.split("</think>")[1], reasoning)


def test_a_sequence_is_prompt_scored_part_and_end_token(tokenizer):
    row = encoder(tokenizer, False).sequence(PAIR.chosen)
    assert row.tokens == [tokenizer.bos, *tokenizer.encode("Q: 2 + 3\nA: 5"), tokenizer.eos]
    assert row.loss_start == len(row.tokens), "nothing is learned"


def test_the_critique_precedes_the_end_token_and_is_in_the_loss(tokenizer):
    plain, row = encoder(tokenizer, False).sequence(PAIR.chosen), encoder(tokenizer, True).sequence(PAIR.chosen)
    assert row.tokens == [*plain.tokens[:-1], *tokenizer.encode("\nright"), tokenizer.eos]
    assert row.tokens[row.loss_start :] == [*tokenizer.encode("\nright"), tokenizer.eos]


def test_long_examples_are_dropped_and_counted(tokenizer):
    long = PreferenceExample("t", LabelledResponse("2 + 3", "</think>" + "1, " * 50), PAIR.rejected)
    examples, dropped = encode_preferences([PAIR, long, PAIR], encoder(tokenizer, False), 40)
    assert (len(examples), dropped) == (2, 1)


def test_reasoning_that_is_missing_is_an_error(tokenizer):
    bare = PreferenceExample("t", LabelledResponse("2 + 3", "</think>5"), PAIR.rejected)
    with pytest.raises(DataError, match=r"prompt='2 \+ 3': has no critique"):
        encode_preferences([bare], encoder(tokenizer, True), 40)


def test_every_epoch_visits_everything_once_in_an_order_of_its_own():
    examples = [TokenizedPreference((TokenizedSequence([number], 1),), True) for number in range(50)]
    preferences = PreferenceDataset(examples, seed=3)
    epochs = [[e.sequences[0].tokens[0] for e in preferences.batch(start, 50)] for start in (0, 50)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert preferences.batch(47, 6) == [*preferences.batch(47, 3), *preferences.batch(50, 3)]


def test_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_critique": "j", "system": "", "tools": None})
        + "\n\n"
    )
    assert list(read_preferences(RowSource(path), True)) == [
        PreferenceExample("file", LabelledResponse("p", "c", "j"), LabelledResponse("p", "r"))
    ]
    path.write_text(json.dumps({"prompt": "p", "response": "r", "safe": False, "task": "k"}))
    assert list(read_preferences(RowSource(path), False)) == [
        PreferenceExample("k", LabelledResponse("p", "r"), safe=False)
    ]


@pytest.mark.parametrize(
    ("pairwise", "rows"),
    [
        (
            True,
            [
                {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_critique": "j", "task": "k"},
                {"prompt": "\u95ee", "chosen": "\u7b54", "rejected": "r"},
            ],
        ),
        (
            False,
            [
                {"prompt": "p", "response": "r", "safe": False, "critique": "j"},
                {"prompt": "q", "response": "s", "safe": True, "task": "k"},
            ],
        ),
    ],
    ids=["pairs", "labelled"],
)
def test_parquet_gives_the_rows_of_jsonl(tmp_path, pairwise, rows):
    """A table has every column in every row: what a row of JSONL leaves out is null there."""
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), table)
    found = list(read_preferences(RowSource(table), pairwise))
    assert found == list(read_preferences(RowSource(lines), pairwise)) and len(found) == 2
    assert {example.task for example in found} == {"file", "k"}


@pytest.mark.parametrize(
    ("line", "pairwise", "reason"),
    [
        ('{"a', True, "is not JSON"),
        ("3", True, "is not a JSON object"),
        ('{"prompt": "p", "chosen": "c"}', True, "rejected must be text"),
        ('{"prompt": "p", "chosen": "c", "rejected": ""}', True, "rejected must be text"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "system": "s"}', True, "has system, which nothing reads"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "history": [["a", "b"]]}', True, "has history, which"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "images": ["a"]}', True, "has images, which"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "tools": [{}]}', True, "has tools, which"),
        ('{"prompt": "p", "response": "r", "safe": true, "input": "x"}', False, "has input, which"),
        ('{"prompt": "p", "chosen": [{"role": "user"}], "rejected": "r"}', True, "chosen must be text"),
        ('{"prompt": "p", "response": "r", "safe": 1}', False, "safe must be true or false"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, pairwise, reason):
    path = tmp_path / "items.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=f"{path.name}:2: {reason}"):
        list(read_preferences(RowSource(path), pairwise))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="^path=nowhere.jsonl: no such file"):
        list(read_preferences(RowSource(Path("nowhere.jsonl")), True))


def pairs(*lengths: tuple[int, int]) -> list[PreferenceExample]:
    return [
        PreferenceExample("t", LabelledResponse("q", "x" * better), LabelledResponse("q", "x" * worse))
        for better, worse in lengths
    ]


def test_the_length_baseline_uses_length_where_it_is_informative():
    assert length_baseline(pairs((5, 2), (4, 3), (1, 2)), pairs((3, 1), (1, 3), (2, 2)), len) == [1.0, 0.0, 0.5]
    assert length_baseline(pairs((2, 5), (3, 4)), pairs((3, 1), (1, 3)), len) == [0.0, 1.0]
    labelled = [PreferenceExample("t", LabelledResponse("q", "x" * size), safe=size < 4) for size in (1, 2, 3, 4, 5, 6)]
    assert length_baseline(labelled, labelled, len) == [1.0] * 6
