"""Tables of sampled responses have some of all groups, and a bounded size."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.rl import RLConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rl.generation.sample_tables import MOST_CHARACTERS, shortened, show_some, spread
from tests.support.samples import make_sample


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DataConfig(num_documents=100))


def test_a_table_is_made_every_few_steps_and_is_small(tokenizer: Tokenizer) -> None:
    tables: dict[int, list[dict[str, Any]]] = {}
    show = show_some(RLConfig(sample_table_interval=3, sample_table_rows=4), tokenizer, tables.__setitem__)
    prompt = tuple(tokenizer.encode("What is 2 + 2?")) * 2000
    parts = {"accuracy": 1.0, "format": 0.25}
    samples = [
        make_sample(prompt_id=str(n), prompt_tokens=prompt, text="\U0001f600" * 10**6, reward=1.25, reward_parts=parts)
        for n in range(8)
    ]
    for step in range(1, 8):
        show(step, samples)
    assert [*tables] == [3, 6] and [row["prompt_id"] for row in tables[6]] == ["0", "2", "4", "6"]
    row = tables[6][0]
    assert row["prompt"].startswith("What is 2 + 2?") and row["prompt"].endswith("What is 2 + 2?")
    assert (row["step"], row["reward"], row["reward/accuracy"], row["reward/format"]) == (6, 1.25, 1.0, 0.25)
    assert len(json.dumps(tables[6], ensure_ascii=False).encode()) < 4 * 2 * 5 * MOST_CHARACTERS


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert shortened("a" * MOST_CHARACTERS) == "a" * MOST_CHARACTERS
    half = MOST_CHARACTERS // 2
    assert shortened("a" * half + "b" * 7 + "c" * half) == f"{'a' * half} [... 7 characters ...] {'c' * half}"


@pytest.mark.parametrize(("count", "found"), [(1, "0"), (3, "012"), (9, "012")])
def test_samples_are_from_all_over_a_rollout(count: int, found: str) -> None:
    samples = [make_sample(prompt_id=str(number)) for number in range(3)]
    assert "".join(sample.prompt_id for sample in spread(samples, count)) == found
