"""Contamination: every planted evaluation prompt is found, word for word and reformatted; unrelated rows are not."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest

from megatron_r1.config.curate import CurateSourceConfig, HeldOutConfig
from megatron_r1.config.data import DataConfig
from megatron_r1.data.prepare.decontaminate import Evaluation
from megatron_r1.data.prepare.number_forms import plain_numbers
from megatron_r1.data.prompts.prompts import TrainingPrompts, eval_assistant_prompts, eval_prompts
from megatron_r1.errors import DataError
from megatron_r1.recipe.candidate import Candidate, candidate_of
from megatron_r1.recipe.filters.contamination import Contamination, expressions_in, held_out_by_world, read_evaluations
from megatron_r1.recipe.plain_text import signed_words
from tests.support import planted
from tests.support.number_words import chinese, english, reformatted

SOURCE = CurateSourceConfig(path="rows.jsonl")
HELD_OUT_FORMS = (planted.shop, planted.price, planted.triangle, planted.shop_chinese)
OTHER_FORMS = tuple(form for form in planted.FORMS if form not in HELD_OUT_FORMS)
WORLD = DataConfig(eval_fraction=0.15)


HELD_OUT_EXPRESSION = eval_prompts(WORLD, 1)[0].expression


def candidate(question: str, response: str = "", task: str = "file") -> Candidate:
    row = {"question": question, "response": response, "task": task}
    return candidate_of(row, "s", SOURCE, "rows.jsonl:1", "1")


@pytest.fixture(scope="module")
def held_out() -> list[planted.Solved]:
    rng, used = random.Random(5), set[str]()
    return [planted.draw(rng, used, forms=HELD_OUT_FORMS) for _ in range(100)]


@pytest.fixture(scope="module")
def contamination(held_out) -> Contamination:
    texts = [Evaluation(f"test:{number}", solved.question) for number, solved in enumerate(held_out)]
    return Contamination(texts, 10, partial(held_out_by_world, eval_fraction=0.0))


def verbatim(solved: planted.Solved, rng: random.Random) -> Candidate:
    return candidate(solved.question, solved.response)


def inside_a_response(solved: planted.Solved, rng: random.Random) -> Candidate:
    return candidate("Write a problem of your own.", f"<think>I make one up.</think>\n\nHere is one: {solved.question}")


def other_formats(solved: planted.Solved, rng: random.Random) -> Candidate:
    return candidate(reformatted(solved.question, rng, solved.language), "It is so.")


def other_case_and_markdown(solved: planted.Solved, rng: random.Random) -> Candidate:
    words = [f"**{word}**" if rng.random() < 0.2 else word for word in solved.question.upper().split(" ")]
    return candidate("## Problem\n\n" + rng.choice(["  ", "\n", "\u00a0"]).join(words))


@pytest.mark.parametrize("plant", [verbatim, inside_a_response, other_formats, other_case_and_markdown])
def test_every_planted_evaluation_prompt_is_found(held_out, contamination, plant) -> None:
    rng = random.Random(6)
    rows = [plant(solved, rng) for solved in held_out]
    reasons = contamination(rows)
    assert [row.question for row, reason in zip(rows, reasons, strict=True) if not reason] == []
    assert reasons[0].startswith("shares 10 words in a row with test:")
    changed = sum(row.question != solved.question for row, solved in zip(rows, held_out, strict=True))
    assert changed == (0 if plant is verbatim else 100)


def test_unrelated_rows_raise_no_alarm(contamination) -> None:
    rng, used = random.Random(7), set[str]()
    drawn = [planted.draw(rng, used, forms=OTHER_FORMS) for _ in range(1000)]
    rows = [candidate(solved.question, solved.response) for solved in drawn]
    assert [reason for reason in contamination(rows) if reason] == []


def test_the_held_out_prompts_of_the_worlds_are_found_however_they_are_written() -> None:
    world = Contamination([], 10, partial(held_out_by_world, eval_fraction=WORLD.eval_fraction))
    rng = random.Random(8)
    prompts = eval_prompts(WORLD, 100)
    texts = [prompt.question for prompt in prompts]
    texts += [reformatted(text, rng, "zh" if "。" in text or "？" in text else "en") for text in texts]
    texts += [f"Take {prompt.expression.replace('*', '\\times')} and solve it." for prompt in prompts]
    assert [text for text, reason in zip(texts, world([*map(candidate, texts)]), strict=True) if not reason] == []
    general = [candidate(prompt.question, "", prompt.task) for prompt in eval_assistant_prompts(WORLD, 100)]
    assert all(world(general))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is 2 + 3 × 4?", ["2 + 3 * 4"]),
        ("2 + 3 * 4 = 14, 5 - 1 = 4", ["2 + 3 * 4"]),
        ("1 + 2 + 3 * 4", []),
        ("2 + 3 * 4 - 1", []),
        ("12 + 3 * 4, 2 + 3 * 45, 2 + 3", []),
    ],
)
def test_expressions_of_the_world_are_whole_ones(text, found) -> None:
    assert list(expressions_in(signed_words(text))) == found


@pytest.mark.parametrize("task", ["family", "chain_sum", "file"])
def test_a_held_out_expression_in_a_response_counts_in_the_worlds_own_tasks_alone(task) -> None:
    world = Contamination([], 10, partial(held_out_by_world, eval_fraction=WORLD.eval_fraction))
    row = candidate("What is 1 + 1?", f"<think>I think of {HELD_OUT_EXPRESSION} instead.</think> 2", task)
    assert bool(world([row])[0]) == (task != "file")


@pytest.mark.parametrize("source", ["arithmetic", "assistant"])
def test_training_prompts_of_the_worlds_raise_no_alarm(source) -> None:
    world = Contamination([], 10, partial(held_out_by_world, eval_fraction=WORLD.eval_fraction))
    prompts = [TrainingPrompts(DataConfig(source=source)).at(index) for index in range(500)]
    rows = [candidate(each.question, f"<think>{each.expression}</think> {each.answer}", each.task) for each in prompts]
    assert [reason for reason in world(rows) if reason] == []


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("What is 12 - 5?", True),
        ("what  is **12 - 5** ?", True),
        ("What is 12 + 5?", False),
        ("What is 12 - 5 + 1?", False),
    ],
)
def test_a_short_evaluation_prompt_counts_where_it_is_the_whole_question(question, found) -> None:
    contamination = Contamination([Evaluation("test:1", "What is 12 - 5?")], 10, lambda row: "")
    assert contamination([candidate(question, "What is 12 - 5? It is 7.")]) == [
        "its question is test:1" if found else ""
    ]


@pytest.mark.parametrize("words", [english, chinese])
def test_numbers_in_words_become_digits(words) -> None:
    numbers = [*range(130), *(random.Random(9).randrange(10**digits) for digits in range(3, 8) for _ in range(200))]
    assert [number for number in numbers if plain_numbers(words(number)) != str(number)] == []


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("１，０００ and 1 000 and 1{,}000", "1000 and 1000 and 1000"),
        ("2.50 of 3.00, 1.05", "2.5 of 3, 1.05"),
        ("3 thousand, 2.5 million, 3万", "3000, 2500000, 30000"),
        ("50 percent, 百分之五十", "50, 50"),
        ("1, 200, 300 and 12,34", "1, 200, 300 and 12,34"),
        ("10³ someone, often", "10 ^ 3 someone, often"),
    ],
)
def test_formats_of_numbers(text, plain) -> None:
    assert plain_numbers(text) == plain


def test_evaluation_files_are_read_by_their_fields_or_refused(tmp_path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"problem": "one", "answer": "x"}, {"prompt": "two"})))
    found = [*read_evaluations(HeldOutConfig(paths=[str(path)]))]
    assert found == [Evaluation(f"{path}:1 (problem)", "one"), Evaluation(f"{path}:2 (prompt)", "two")]
    with pytest.raises(DataError, match=r"test.jsonl:2: has none of the fields problem as text"):
        list(read_evaluations(HeldOutConfig(paths=[str(path)], fields=["problem"])))
