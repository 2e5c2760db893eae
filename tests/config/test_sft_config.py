"""Recipes of fine-tuning hold the reports' numbers, and refuse what is none."""

from __future__ import annotations

import pytest

from megatron_r1.config.keys import reads
from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError
from megatron_r1.train.schedule import learning_rate


@pytest.mark.parametrize(("recipe", "first", "last"), [("sft_v3", 5e-6, 1e-6), ("sft_r1", 5e-5, 5e-6)])
def test_schedules_are_the_reports(recipe, first, last):
    config = load("sft", [], recipe)
    schedule, steps = config.train.schedule, 1000
    rates = [learning_rate(schedule, step, steps, 0) for step in range(1, steps + 1)]
    assert rates[0] == pytest.approx(first, rel=1e-4) and rates[-1] == pytest.approx(last)
    assert rates[499] == pytest.approx((first + last) / 2) and rates == sorted(rates, reverse=True)
    assert (config.sft.epochs, config.sft.packing, config.train.sequence_length) == (2, "best_fit", 32_768)
    assert config.train.global_batch_size == 128
    assert not reads("sft", "model.moe.bias_update_rate") and not reads("sft", "model.moe.sequence_loss_coefficient")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source=web", "sft.source=web: must be one of arithmetic, assistant, files"),
        ("loss_on=none", "sft.loss_on=none: must be one of all, last, each"),
        ("response_text=short", "sft.response_text=short: must be one of template, verbatim"),
        ("overlong=keep", "sft.overlong=keep: must be one of drop, truncate"),
        ("packing=tight", "sft.packing=tight: must be one of best_fit, none"),
        ("epochs=0", "sft.epochs=0: must be at least 1"),
        ("max_bad_share=2", "sft.max_bad_share=2.0: must lie between"),
        ("chat_template=''", "sft.chat_template=: must be r1_zero, tokenizer or a file"),
        ("datasets.a.split=test", "sft.datasets.a.path=: must name a"),
        ("datasets.a.pth=b", "sft.datasets.a.pth=b: no such key"),
        ("teacher.from_=a", "sft.teacher.from_=a: no such key; did you mean sft.teacher.from?"),
        ("teacher.top_k=0", "sft.teacher.top_k=0: must be at least 1"),
        ("teacher={top_k:1,tail:renormalise}", "sft.teacher.top_k=1: must be at least 2 with tail=renormalise"),
        ("teacher.tail=head", "sft.teacher.tail=head: must be one of rest, renormalise, drop"),
        ("teacher.temperature=0", "sft.teacher.temperature=0.0: must lie between"),
        ("teacher.weight=0", "sft.teacher.weight=0.0: must be above 0 and at most 1"),
        ("teacher.weight=1.5", "sft.teacher.weight=1.5: must be above 0 and at most 1"),
    ],
)
def test_what_is_not_allowed_is_one_line(override, message):
    with pytest.raises(ConfigError) as refused:
        load("sft", [f"sft.{override}"])
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_teacher_reads_packed_examples_alone():
    assert load("sft", ["sft.packing=none"]).sft.teacher.from_ == ""
    with pytest.raises(ConfigError) as refused:
        load("sft", ["sft.packing=none", "sft.teacher.from=runs/teacher"])
    assert str(refused.value) == "sft.packing=none: must be best_fit with teacher.from"
