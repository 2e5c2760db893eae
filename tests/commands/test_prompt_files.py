"""Prompt files as they are published: grpo, sample and evaluate read the same true answers, or refuse the same row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.keys import only_read
from tests.support.fork_server import run_forked

pytestmark = pytest.mark.timeout(300)
SHARED = ["platform=cpu", "threads=1", "seed=3", "rollout=local", "track=off", "rollout.max_response_tokens=6"]
STEPS = ["train.steps=2", "train.schedule.warmup_steps=1", "data.num_documents=300", "train.save_interval=2"]
SHAPE = ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2"]
VERBS = {
    "grpo": ["train.steps=1", "train.schedule.warmup_steps=0", "rl.prompts_per_rollout=2", "rl.group_size=2",
             "rl.updates_per_rollout=1"],
    "sample": ["sample.samples_per_prompt=1"],
    "evaluate": ["evaluate.samples_per_prompt=1", "evaluate.num_prompts=10"],
}  # fmt: skip
PROGRAM = """
import json, sys
if __name__ == "__main__":  # which processes that it starts are not
    from megatron_r1.__main__ import exit_code
    for arguments in json.load(open(sys.argv[1])):
        print("CODE", exit_code(arguments), flush=True)
"""
GRADE_SCHOOL = [
    {"question": "Ann has 4 pens and buys 3. How many?", "answer": "She has 4 + 3 = <<4+3=7>>7 pens.\n#### 7"},
    {
        "question": "Tom has 1,000 nails and buys 80. How many?",
        "answer": "1000 + 80 = <<1000+80=1080>>1,080\n#### 1,080",
    },
]
COMPETITION = [
    {"problem": "Half of 1?", "level": "Level 1", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
    {"problem": "Solve x < 5", "level": "Level 2", "solution": "So \\[\\boxed{x<5}.\\]"},
]
CODE = {"language": "python", "entry_point": "f", "tests": ["assert f(1"]}
REFUSED = {
    "absent": ({"question": "1?", "solution": "5"}, "has no true answer by field answer"),
    "unreadable": ({"question": "1?", "answer": "\\frac{1}{2}"}, "the verifier number cannot read"),
    "unknown_task": ({"question": "1?", "answer": "5", "task": "maths"}, "there is no task 'maths'"),
    "broken_tests": ({"question": "1?", "answer": CODE, "task": "code"}, "tests of a code prompt are invalid"),
    "too_long": ({"question": "5 + " * 300, "answer": "5"}, "model.max_sequence_length minus"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """The folder, and exit status and messages of every command, which share one process."""
    root = tmp_path_factory.mktemp("runs")
    write(root / "grade_school.jsonl", GRADE_SCHOOL)
    write(root / "competition.jsonl", COMPETITION)
    commands = [["pretrain", *only_read("pretrain", SHARED), *STEPS, *SHAPE, "name=base"]]
    fields = ["data.prompts.question_field=problem", "data.prompts.answer_field=solution", "reward.verifier=math"]
    fields += ["reward.math.timeout_s=60"]  # of a busy machine
    for verb, keys in VERBS.items():
        for name, more in (("grade_school", []), ("competition", fields)):
            commands.append(command(root, verb, name, [*keys, *more]))
    for name, (row, _) in REFUSED.items():
        write(root / f"{name}.jsonl", [GRADE_SCHOOL[0], row])
        commands += [command(root, verb, name, keys) for verb, keys in VERBS.items()]
    lines = [[*arguments, f"root='{root}'"] for arguments in commands]
    (root / "program.py").write_text(PROGRAM)
    (root / "commands.json").write_text(json.dumps(lines))
    done = run_forked(root / "program.py", root / "commands.json", seconds=300)
    codes = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("CODE ")]
    assert len(codes) == len(commands), done.stderr[-3000:]
    return root, list(zip((" ".join(line[:1] + line[-2:-1]) for line in lines), codes, strict=True)), done.stderr  # type: ignore[return-value]


def command(root: Path, verb: str, name: str, keys: list[str]) -> list[str]:
    path = f"data.prompts.path='{root}/{name}.jsonl'"
    return [verb, *only_read(verb, SHARED), *keys, path, f"init.from='{root}/base'", f"name={verb}_{name}"]


def test_published_files_are_read_with_the_right_answers(outcomes):
    root, codes, stderr = outcomes
    accepted = [(name, code) for name, code in codes if not any(reason in name for reason in REFUSED)]
    assert len(accepted) == 7 and {code for _, code in accepted} == {"0"}, stderr[-3000:]
    assert "2 rows: the true answer is what follows #### in a worked solution" in stderr
    assert "2 rows: the true answer is what stands in the box of a worked solution" in stderr
    assert "nothing reads the fields level" in stderr
    for verb, file in (("sample", "samples.jsonl"), ("evaluate", "samples/model.jsonl")):
        for name, truths in (("grade_school", {"7", "1,080"}), ("competition", {"\\frac{1}{2}", "x<5"})):
            lines = (root / f"{verb}_{name}" / file).read_text().splitlines()
            assert {json.loads(line)["truth"] for line in lines} == truths


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_refused_by_every_verb_before_it_begins(outcomes, name):
    root, codes, stderr = outcomes
    assert [code for run, code in codes if run.endswith(f"_{name}")] == ["3"] * len(VERBS)
    refused = [line for line in stderr.splitlines() if f"{name}.jsonl:2: " in line and line.startswith("megatron-r1: ")]
    assert len(refused) == len(VERBS) and all(REFUSED[name][1] in line for line in refused)
    assert not [run for run in root.glob(f"*_{name}") if (run / "checkpoints").exists() or (run / "parts").exists()]
