"""Which pairs direct preference optimization trains on, and which it is evaluated on."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.dpo import DpoConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.preference.policy_encoder import PolicyPairEncoder
from megatron_r1.data.synthetic.assistant.hidden_rules import verdict
from megatron_r1.errors import DataError
from megatron_r1.preference.items import eval_items, training_items
from megatron_r1.preference.step import encode_eval_pairs
from tests.support.chats import small_tokenizer


def test_all_pairs_of_files_are_used(tmp_path):
    for name, count in (("train", 3), ("eval", 2)):
        rows = [{"prompt": f"{name} {n}?", "chosen": "yes", "rejected": "no"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DpoConfig(
        source="file",
        train_file=str(tmp_path / "train.jsonl"),
        eval_file=str(tmp_path / "eval.jsonl"),
        eval_examples=1,
    )
    training, evaluated = training_items(settings, DataConfig(), 1), eval_items(settings, DataConfig())
    assert [item.question for item in training] == ["train 0?", "train 1?", "train 2?"]
    assert [(item.question, item.chosen.response) for item in evaluated] == [
        ("eval 0?", "yes"),
        ("eval 1?", "yes"),
    ]


def test_generated_validation_pairs_are_labelled_by_the_hidden_rules():
    data = DataConfig(source="assistant")
    training, evaluated = training_items(DpoConfig(), data, 7), eval_items(DpoConfig(eval_examples=9), data)
    assert (len(training), len(evaluated)) == (7, 9)
    assert not {item.question for item in training} & {item.question for item in evaluated}
    for item in evaluated:
        assert [verdict(side.question, side.response).helpful for side in item.responses] == [True, False]


def test_validation_pairs_longer_than_a_sequence_are_dropped_and_counted(caplog):
    encoder = PolicyPairEncoder(PromptFormatter(small_tokenizer(), "none"))
    items = eval_items(DpoConfig(eval_examples=8), DataConfig(source="assistant"))
    lengths = [encoder.example(item).length for item in items]
    longest = sorted(lengths)[3]
    used, examples = encode_eval_pairs(items, encoder, longest)
    assert used == [item for item, length in zip(items, lengths, strict=True) if length <= longest]
    assert examples == [encoder.example(item) for item in used]
    assert f"{len(used)} validation pairs kept, {8 - len(used)} dropped" in caplog.text
    with pytest.raises(DataError, match=f"train.sequence_length={min(lengths) - 1}: holds none of the 8 validation"):
        encode_eval_pairs(items, encoder, min(lengths) - 1)
