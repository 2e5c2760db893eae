"""The whole of R1's recipe, killed at five moments: it completes with the results of an undisturbed run.

It takes the recipe's time twice, some 50 minutes; R1_TINY_RUN names the folder of an undisturbed run with seed 1, and
then once. What SGLang's servers sampled is not repeated token by token, so the stages behind R1-Zero are compared by
their intervals, all others exactly.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_r1.evaluation.intervals import Interval
from megatron_r1.files import read_json
from tests.support.jobs import comparable
from tests.support.recipes import DIES_WITHIN_S, Recipe, lives

KILLS = (("pretrain", "parent"), ("r1_zero", "server"), ("math_expert", "rank"), ("v3", "parent"), ("r1", "rank"))
"""During which stage, and which process: the recipe's own, a stage's, or a server of a stage."""
WHOLE_S = 5400.0
FILES = ("samples.jsonl", "conversations.jsonl", "prompts.jsonl")


@dataclass(frozen=True)
class TinyR1(Recipe):
    """The recipe r1_tiny as it is, with seed 1."""

    @property
    def folder(self) -> Path:
        return self.root / "r1_tiny"

    @property
    def command(self) -> list[str]:
        recipe = [sys.executable, "-m", "megatron_r1", "pipeline", "--config-name", "r1_tiny"]
        return [*recipe, "platform=cpu", "seed=1", f"root='{self.root}'"]

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """The stages as `pipeline.json` has them, by name."""
        path = self.folder / "pipeline.json"
        return {stage["name"]: stage for stage in read_json(path)["stages"]} if path.is_file() else {}

    def behind(self, source: str) -> set[str]:
        """A stage and those that its output reaches."""
        reached = {source}
        for name, stage in self.stages.items():  # in the order of their needs
            inputs = {output.partition(".")[0] for output in stage["inputs"].values()}
            reached |= {name} if inputs & reached else set()
        return reached


def wait_until(condition, seconds: float = WHOLE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def process_of(parent: psutil.Process, stage: str) -> psutil.Process:
    return next(child for child in parent.children() if f"name={stage}" in child.cmdline())


def kill_during(recipe: TinyR1, stage: str, victim: str) -> str:
    """Start the recipe and kill one of its processes while it runs the stage; says when all were gone."""
    before = len(recipe.rows(stage))
    with recipe.started() as parent:
        wait_until(lambda: parent.poll() is not None or recipe.stages.get(stage, {}).get("state") == "running")
        assert parent.poll() is None, recipe.log[-2000:]
        wait_until(lambda: len(recipe.rows(stage)) > before, 300)
        time.sleep(random.Random(stage).uniform(0, 5))
        target = parent if victim == "parent" else process_of(parent, stage)
        if victim == "server":
            target = next(child for child in target.children() if "sglang" in " ".join(child.cmdline()))
        known = [parent, *parent.children(recursive=True)]
        done = sum(each["state"] == "done" for each in recipe.stages.values())
        below = target.children(recursive=True)
        target.kill()
        killed = time.monotonic()
        if victim == "server":  # the stage starts another; it ends if the only one died with an update
            psutil.wait_procs(below, DIES_WITHIN_S)
            assert not [*filter(lives, below)]
            rows = len(recipe.rows(stage))
            wait_until(lambda: parent.poll() is not None or len(recipe.rows(stage)) > rows + 1, 300)
            if parent.poll() is None:
                seconds = time.monotonic() - killed
                return f"{victim} of {stage}, {done} stages done: it sampled on {seconds:.0f} s later"
        assert parent.wait(120) != 0
        gone = recipe.seconds_until_gone(known, killed if victim == "parent" else time.monotonic())
        return f"{victim} of {stage}, {done} stages done: {len(known)} processes gone {gone:.1f} s later"


def main_interval(model: Mapping[str, Any]) -> Interval:
    return Interval(**next(iter(model["sampled"].values())))


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(4 * WHOLE_S)
def test_r1_tiny_completes_after_five_kills_with_the_same_results(tmp_path: Path) -> None:
    calm, recipe = TinyR1(Path(os.environ.get("R1_TINY_RUN", tmp_path / "calm/r1_tiny")).parent), TinyR1(tmp_path)
    if not (calm.folder / "pipeline.json").is_file():
        calm.run(WHOLE_S)
    for stage, victim in KILLS:
        print(kill_during(recipe, stage, victim), flush=True)
    recipe.run(WHOLE_S)
    assert recipe.processes() == [] and {stage["state"] for stage in recipe.stages.values()} == {"done"}
    sampled = recipe.behind("r1_zero")
    exact = [name for name in recipe.stages if name not in sampled]
    for name in exact:
        assert comparable(recipe.rows(name)) == comparable(calm.rows(name)), name
        for file in filter(lambda file: (calm.folder / name / file).is_file(), FILES):
            assert (recipe.folder / name / file).read_bytes() == (calm.folder / name / file).read_bytes(), (name, file)
    compared = 0
    for results in calm.folder.glob("evaluate_*/results.json"):
        ours = read_json(recipe.folder / results.parent.name / "results.json")["models"]
        for model, theirs in read_json(results)["models"].items():
            if model in exact:
                assert main_interval(ours[model]) == main_interval(theirs), model
            else:
                assert not main_interval(ours[model]).disjoint(main_interval(theirs)), model
            compared += 1
    print(json.dumps({"exact": len(exact), "by intervals": len(sampled), "evaluated": compared}))
    assert compared == 22
