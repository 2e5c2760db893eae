"""evaluate from the command line: kept checkpoints as a curve; what a killed evaluation finished is not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.keys import only_read
from tests.support.fork_server import run_forked

MODEL = ["platform=cpu", "threads=1", "seed=3", "rollout=local", "track=off", "rollout.max_response_tokens=12"]
STEPS = ["train.steps=3", "train.schedule.warmup_steps=1", "data.num_documents=300", "train.save_interval=1"]
SHAPE = ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2"]
EVALUATE = [
    "evaluate.every=1",
    "evaluate.num_prompts=6",
    "evaluate.samples_per_prompt=4",
    "evaluate.instruction=Think.",
]
DYING = """
import os, sys
from megatron_r1.__main__ import exit_code
from megatron_r1.commands import evaluate

write = evaluate.ModelResult.write

def dies(self, result):
    write(self, result)
    os._exit(9)

if __name__ == "__main__":
    assert exit_code({pretrain}) == 0
    evaluate.ModelResult.write = dies
    sys.exit(exit_code(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of an evaluation that died after its first model and was started again."""
    root = tmp_path_factory.mktemp("runs")
    pretrain = ["pretrain", *only_read("pretrain", MODEL), *STEPS, *SHAPE, f"root='{root}'", "name=base"]
    evaluate = ["evaluate", *only_read("evaluate", MODEL), *EVALUATE, f"init.from='{root}/base'"]
    evaluate += [f"root='{root}'", "name=curve"]
    (root / "dying.py").write_text(DYING.format(pretrain=pretrain))
    died = run_forked(root / "dying.py", *evaluate)
    assert died.returncode == 9, died.stderr
    finished = list((root / "curve" / "models").iterdir())
    assert len(finished) == 1 and not (root / "curve" / "results.json").exists()
    (root / "curve" / "samples" / f"{finished[0].stem}.jsonl").write_text("not sampled again\n")
    done = run_forked("megatron_r1", *evaluate)
    assert done.returncode == 0, done.stderr
    (root / "curve" / "printed.txt").write_text(done.stdout)
    return root / "curve"


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_kept_checkpoint_is_a_point_of_the_curve(folder, results):
    kept = sorted(path.name for path in (folder.parent / "base" / "checkpoints").glob("step-*"))
    assert list(results["models"]) == kept and len(kept) >= 2
    for name, points in results["curve"].items():
        assert [f"step-{point['step']:08d}" for point in points] == kept
        for point in points:
            own = results["models"][f"step-{point['step']:08d}"]
            assert point["mean"] == (own["sampled"] | own["behaviour"]["sampled"])[name]["mean"]
    assert {"correct_any_format", "correct_tagged", "mixed_language", "response_length", "reflection_words"} <= set(
        results["curve"]
    )


def test_a_model_that_was_finished_is_not_sampled_again(folder, results):
    files = {path.stem: path.read_text() for path in (folder / "samples").iterdir()}
    assert list(files.values()).count("not sampled again\n") == 1 and set(files) == set(results["models"])


def test_every_response_is_written_with_its_scores(folder, results):
    texts = [path.read_text() for path in (folder / "samples").iterdir()]
    [sampled] = [text for text in texts if text != "not sampled again\n"]
    rows = [json.loads(line) for line in sampled.splitlines()]
    assert [(row["mode"], row["sample"]) for row in rows] == [("greedy", 0)] * 6 + [
        ("sampled", number) for _ in range(6) for number in range(4)
    ]
    assert all(row["question"].endswith("\n\nThink.") and 1 <= row["response_tokens"] <= 12 for row in rows)
    assert (results["prompts"], results["samples"], results["temperature"], results["top_p"]) == (6, 4, 1.0, 1.0)


def test_the_terminal_shows_pass_at_k_votes_and_behaviour(folder):
    printed = (folder / "printed.txt").read_text()
    for title in ("6 held-out prompts, 4 samples each", "pass@k", "cons@k", "behaviour"):
        assert title in printed
