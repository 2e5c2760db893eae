"""True answers as files hold them: numbers, worked solutions, patterns and functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.rewards.accuracy import truth_problems
from tests.support.chats import small_tokenizer

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
GRADE_SCHOOL = "She has 4 + 3 = <<4+3=7>>7 pens.\n#### 7"
COMPETITION = "We get $\\boxed{\\frac{1}{2}}$ at once."


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., PromptFile]:
    """Reads rows with a verifier, as grpo, sample and evaluate do."""

    def reading(rows: Sequence[dict[str, Any]], verifier: str = "number", **config: Any) -> PromptFile:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        problems = partial(truth_problems, RewardConfig(verifier=verifier))
        return read_prompts(PromptsConfig(path=str(path), **config), lambda question: None, truth_problems=problems)

    return reading


def row(answer: Any, **more: Any) -> dict[str, Any]:
    return {"question": "How many?", "answer": answer, **more}


@pytest.mark.parametrize(
    ("answer", "verifier", "truth"),
    [
        (GRADE_SCHOOL, "number", "7"),
        (GRADE_SCHOOL.replace("7 pens", "7 pens of \\boxed{8}"), "number", "7"),
        ("#### 1,080", "number", "1,080"),
        (COMPETITION, "math", "\\frac{1}{2}"),
        ("first \\boxed{5} and so \\boxed{5}", "number", "5"),
        ("the answer is \\boxed{\\text{(B)}}", "math", "\\text{(B)}"),
        (1e-7, "number", "0.0000001"),
        (2.5e-12, "math", "0.0000000000025"),
        (12, "number", "12"),
        (-0.5, "number", "-0.5"),
        (10**30, "number", str(10**30)),
        ("x #### 5", "text", "x #### 5"),
        ("\u2212\u00bd", "math", "\u2212\u00bd"),
    ],
)
def test_the_true_answer_is_read_as_it_is_published(read, answer, verifier, truth):
    (prompt,) = read([row(answer)], verifier).prompts
    assert prompt.answer == truth


@pytest.mark.parametrize(
    ("rows", "verifier", "reason"),
    [
        (
            [{"question": "1?", "solution": "5"}],
            "number",
            "has no true answer by field answer.*fields question, solution",
        ),
        ([row("")], "text", "has no true answer"),
        ([row(None)], "math", "has no true answer.*reward.accuracy=0"),
        ([row("\\frac{1}{2}")], "number", "verifier number cannot read .*frac.*reward.verifier=math"),
        ([row("three")], "number", "verifier number cannot read its true answer 'three'"),
        ([row("5 or 6")], "number", "verifier number cannot read"),
        ([row("\\frac{1}{")], "math", "verifier math cannot read .*answer_pattern"),
        ([row("He has two apples and buys three, so that makes 5.")], "math", "verifier math cannot read"),
        ([row("A or B", task="choice")], "number", "verifier choice cannot read"),
        ([row("\\boxed{1} or \\boxed{2}")], "math", "has 2 boxes that differ; data.prompts.answer_pattern"),
        ([row(True)], "number", "answer is neither text nor a number"),
        ([row(1.5e300)], "number", "has lost digits as a JSON number; write it as text"),
        ([row("5", task="maths")], "number", "there is no task 'maths': it must be one of number, text"),
        ([row("5", task="reasoning_gym:no_such")], "number", "reasoning-gym has no task of this name"),
        ([row("5", task="reasoning_gym:chain_sum")], "number", "must be the library's entry as JSON"),
        ([row('{"language": "python", "inputs": ["1"]}', task="code")], "number", "tests of a code prompt are invalid"),
        (
            [row('{"language": "python", "entry_point": "f", "tests": ["assert f(1"]}', task="code")],
            "number",
            "tests of a code prompt are invalid: line 1",
        ),
    ],
)
def test_an_answer_that_no_response_can_match_is_a_bad_row(read, rows, verifier, reason):
    good = row("5", task="number")
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{reason}.*max_bad_rows=0 may be bad"):
        read([good, *rows], verifier)
    found = read([good, *rows, good], verifier, max_bad_rows=1)
    assert len(found.prompts) == 2 and found.bad_rows[0].endswith(found.bad_rows[0].partition("rows.jsonl:2: ")[2])


def test_rows_of_every_task_that_are_right_are_taken(read):
    entry = {
        "question": "?",
        "answer": "olleh",
        "metadata": {"scrambled_words": ["olleh"], "original_words": ["hello"]},
    }
    rows = [
        row("5"),
        row("5", task=None),
        row("B", task="choice"),
        row("\\sqrt{2}", task="math"),
        row("a line", task="text"),
        row(json.dumps(entry), task="reasoning_gym:letter_jumble"),
        row({"language": "python", "inputs": ["1"], "outputs": ["1"], "tests": None}, task="code"),
    ]
    found = read(rows, max_bad_rows=0)
    assert len(found.prompts) == len(rows) and not found.bad_rows


def test_what_was_read_otherwise_and_unread_fields_are_named(read):
    found = read([row(GRADE_SCHOOL, level=1), row(1e-9, subject="algebra")])
    assert [note.partition(";")[0] for note in found.notes] == [
        "1 rows: the true answer is what follows #### in a worked solution",
        "1 rows: the true answer is a number with an exponent, which is spelt out",
        "nothing reads the fields level, subject",
    ]


@pytest.mark.parametrize(
    ("pattern", "answer", "truth"),
    [
        ("= *([0-9]+)", "2 + 3 = 5 so 5 = 5, = 6", "6"),
        ("[0-9]+", "there are 12 of them", "12"),
        ("(?s)Answer:(.*)", "Work.\nAnswer: 7 \n", "7"),
    ],
)
def test_a_pattern_finds_the_answer(read, pattern, answer, truth):
    assert read([row(answer)], answer_pattern=pattern).prompts[0].answer == truth


def test_a_pattern_that_does_not_match_is_a_bad_row_and_a_broken_one_is_refused(read):
    with pytest.raises(DataError, match="rows.jsonl:1: data.prompts.answer_pattern does not match its answer"):
        read([row("none")], answer_pattern="=([0-9]+)")
    with pytest.raises(ConfigError, match="answer_pattern=.*must be a regular expression"):
        PromptsConfig(answer_pattern="(")
    with pytest.raises(ConfigError, match="answer_function=.*give one"):
        PromptsConfig(answer_pattern="5", answer_function="a.py:b")
    with pytest.raises(ConfigError, match=r"must be FILE.py:NAME"):
        PromptsConfig(answer_function="a.py")


def test_a_function_finds_the_answer(read, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def truth(row):\n    return row['solution'].split()[-1] if row['ok'] else 1 / 0\n"
    )
    rows = [{"question": "1?", "solution": "it is 5", "ok": True}, {"question": "2?", "solution": "6", "ok": False}]
    function = f"{tmp_path}/mine.py:truth"
    found = read(rows, answer_function=function, max_bad_rows=1)
    assert [prompt.answer for prompt in found.prompts] == ["5"]
    assert "rows.jsonl:2: data.prompts.answer_function raised ZeroDivisionError" in found.bad_rows[0]
    with pytest.raises(ConfigError, match="data.prompts.answer_function=.*has no function other"):
        read(rows, answer_function=f"{tmp_path}/mine.py:other")


def test_fields_of_other_names_are_refused_once_with_the_remedy(read):
    rows = [{"problem": "1?", "solution": COMPETITION, "level": "5"}]
    named = "the row has the fields problem, solution, level; data.prompts.question_field and data.prompts.answer_field"
    with pytest.raises(DataError, match=rf"rows.jsonl:1: question is not text: {named} name those to read"):
        read(rows, "math")
    (prompt,) = read(rows, "math", question_field="problem", answer_field="solution").prompts
    assert prompt.answer == "\\frac{1}{2}"


def test_a_prompt_that_leaves_no_room_for_a_response_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row("5", question=f"What is {n}?")) + "\n" for n in ("5", "5 + " * 300)))
    formatter = PromptFormatter(small_tokenizer(), "r1_zero", max_tokens=400)
    with pytest.raises(DataError, match=r"rows.jsonl:2: its prompt has [0-9]+ tokens; model.max_sequence_length minus"):
        read_prompts(PromptsConfig(path=str(path)), formatter.check)
    assert len(read_prompts(PromptsConfig(path=str(path), max_bad_rows=1), formatter.check).prompts) == 1


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"GSM8K is not there: {GSM8K}")
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k_as_it_is_published(name, count):
    problems = partial(truth_problems, RewardConfig())
    found = read_prompts(PromptsConfig(path=f"{GSM8K}/{name}.jsonl"), lambda question: None, truth_problems=problems)
    published = [json.loads(line)["answer"].rpartition("#### ")[2] for line in (GSM8K / f"{name}.jsonl").open()]
    assert [prompt.answer for prompt in found.prompts] == published and len(published) == count
    assert not found.bad_rows and found.notes[0].startswith(f"{count} rows: the true answer is what follows ####")
