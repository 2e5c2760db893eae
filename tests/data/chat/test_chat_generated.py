"""Conversations of the generated worlds: their shares, correct responses, and no held-out question in training."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.generated import GENERATED, eval_mixed_conversations, mixed_conversations
from megatron_r1.data.synthetic.assistant.hidden_rules import verdict

CONFIG = DataConfig(source="assistant", arithmetic_share=0.25)
ARITHMETIC = {"+", "-", "*"}


def questions(conversations) -> list[str]:
    return [user["content"] for user, _ in conversations]


def is_arithmetic(question: str) -> bool:
    return any(f" {operator} " in question for operator in ARITHMETIC)


def test_general_tasks_and_worked_problems_come_in_the_configured_shares():
    found = questions(mixed_conversations(CONFIG, 2000))
    assert sum(map(is_arithmetic, found)) / len(found) == pytest.approx(0.25, abs=0.03)
    for share in (0.0, 1.0):
        config = DataConfig(source="assistant", arithmetic_share=share)
        assert {is_arithmetic(question) for question in questions(mixed_conversations(config, 50))} == {bool(share)}


def test_every_general_response_does_what_the_question_asks():
    for user, assistant in mixed_conversations(CONFIG, 300):
        if not is_arithmetic(user["content"]):
            assert verdict(user["content"], assistant["content"]) == (True, True)


@pytest.mark.parametrize("source", GENERATED)
def test_training_never_contains_a_validation_question(source):
    world, other = GENERATED[source], replace(CONFIG, seed=1)
    measured = set(questions(world.evaluation(CONFIG, 150)))
    assert measured.isdisjoint(questions(world.training(CONFIG, 3000)))
    assert measured == set(questions(world.evaluation(other, 150)))
    assert questions(world.training(CONFIG, 20)) != questions(world.training(other, 20))


def test_a_longer_list_begins_with_the_shorter():
    for conversations in (mixed_conversations, eval_mixed_conversations):
        assert [*islice(conversations(CONFIG, 100), 20)] == [*conversations(CONFIG, 20)]
