"""Runs of a recipe whose stages are a small program: order, side by side, failures, states in `pipeline.json`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.errors import ExitCode, FolderInUse
from megatron_r1.pipeline.recipe import RECORD, ComposedRecipe
from megatron_r1.pipeline.run import RecipeRun, StageFailed
from tests.support.pipelines import RECIPE, STAGES, composed, composing_once

STAGE = r"""
import json, os, shutil, signal, sys, time
settings = dict(argument.split("=", 1) for argument in sys.argv[2:] if "=" in argument)
root, name = settings["root"].strip("'"), settings["name"]
folder, behaviour = os.path.join(root, name), json.loads(os.environ["BEHAVIOUR"]).get(name, {})
shutil.copy(os.path.join(root, "pipeline.json"), os.path.join(folder, "seen.json"))
def save(*_):
    open(os.path.join(folder, "saved"), "w").close()
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
with open(os.path.join(root, "log"), "a") as log:
    print("start", name, file=log)
time.sleep(behaviour.get("seconds", 0))
for other in behaviour.get("meets", []):
    while f"start {other}" not in open(os.path.join(root, "log")).read():
        time.sleep(0.02)
if "code" in behaviour:
    sys.exit(behaviour["code"])
for path in ("done.json", "samples.jsonl", "conversations.jsonl"):
    if path != behaviour.get("forgets"):
        open(os.path.join(folder, path), "w").write("{}")
with open(os.path.join(root, "log"), "a") as log:
    print("end", name, file=log)
"""
"""A stage that does what the environment says of it, and marks itself done."""


@pytest.fixture(scope="module", autouse=True)
def composing() -> Iterator[None]:
    with composing_once():
        yield


class Toy:
    """A recipe of toy stages."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self._patch = folder, patch
        for name in ("prompts", "rows"):
            (folder.parent / name).touch()
        patch.setattr("megatron_r1.pipeline.run.PROGRAM", (sys.executable, "-c", STAGE))

    def run(self, workers: int = 1, until: str = "", **behaviour: dict[str, Any]) -> ComposedRecipe:
        """Run it; stages do what `behaviour` says."""
        self._patch.setenv("BEHAVIOUR", json.dumps(behaviour))
        text = RECIPE.replace("stages:", f"until: '{until}'\nstages:", 1)
        recipe, pages = composed(self.folder, text), list[int]()
        recipe.folder.mkdir(exist_ok=True)
        recipe.write()
        try:
            RecipeRun(recipe, workers, lambda: pages.append(1)).run()
        finally:
            self.pages = len(pages)
        return recipe

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    @property
    def states(self) -> dict[str, str]:
        return self._states(self.folder / RECORD)

    def states_at_start_of(self, name: str) -> dict[str, str]:
        """What `pipeline.json` said when a stage began."""
        return self._states(self.folder / name / "seen.json")

    def _states(self, path: Path) -> dict[str, str]:
        return {stage["name"]: stage["state"] for stage in json.loads(path.read_text())["stages"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all tests, so that the recipe need not be composed again for each."""
    return tmp_path_factory.mktemp("toy") / "toy"


@pytest.fixture
def toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    yield Toy(folder, monkeypatch)
    shutil.rmtree(folder)


def test_stages_run_in_order_and_once(toy: Toy) -> None:
    toy.run()
    assert toy.log == [f"{what} {name}" for name in STAGES for what in ("start", "end")]
    assert set(toy.states.values()) == {"done"} and toy.pages == len(STAGES)
    during = {name: toy.states_at_start_of(name) for name in STAGES}
    assert list(during["zero"].values())[:4] == ["done", "done", "running", "missing"]
    assert all([*states.values()].count("running") == 1 for states in during.values())
    toy.run()
    assert len(toy.log) == 2 * len(STAGES) and toy.pages == 0


def test_a_stage_that_runs_now_is_listed_as_such_and_another_run_is_refused(toy: Toy) -> None:
    recipe = toy.run(until="pretrain")
    with recipe.lock():
        recipe.refresh("zero", running=True)
        listed = composed(toy.folder)
        listed.note_running()
        assert (listed.states["zero"].state, listed.states["samples"].state) == ("running", "missing")
        with pytest.raises(FolderInUse, match="two jobs cannot run one recipe"):
            listed.lock()
    listed = composed(toy.folder)
    listed.note_running()
    assert listed.states["zero"].state == "missing"


def test_a_failed_stage_ends_the_recipe_and_resumes(toy: Toy) -> None:
    with pytest.raises(StageFailed, match="stage zero ended with exit code 86") as failed:
        toy.run(zero={"code": 86})
    assert failed.value.exit_code == ExitCode.DIVERGED
    assert toy.states == {"pretrain": "done", "helpfulness": "done", "zero": "failed"} | dict.fromkeys(
        STAGES[3:], "missing"
    )
    assert composed(toy.folder).states["zero"].why == "exit code 86; resumes"
    toy.run()
    assert set(toy.states.values()) == {"done"} and toy.log.count("start pretrain") == 1


@pytest.mark.parametrize("path", ["done.json", "conversations.jsonl"])
def test_a_stage_that_ends_without_its_output_is_named(path: str, toy: Toy) -> None:
    with pytest.raises(StageFailed, match=rf"stage curated ended without [^,]*curated/{path}$"):
        toy.run(curated={"forgets": path})
    assert "start cold_start" not in toy.log


def test_independent_stages_run_side_by_side(toy: Toy) -> None:
    """Each of two waits until the other has started; what depends on one starts after its end."""
    toy.run(workers=2, helpfulness={"meets": ["zero"]}, zero={"meets": ["helpfulness"]})
    log = toy.log
    assert set(log[2:4]) == {"start helpfulness", "start zero"} and len(log) == 2 * len(STAGES)
    assert log.index("end zero") < log.index("start samples")
    assert max(log.index("end helpfulness"), log.index("end cold_start")) < log.index("start r1")


def test_when_a_stage_fails_the_others_end_at_their_checkpoint_and_none_starts(toy: Toy) -> None:
    with pytest.raises(StageFailed, match="stage helpfulness ended with exit code 3") as failed:
        toy.run(workers=2, helpfulness={"meets": ["zero"], "code": 3}, zero={"seconds": 60})
    assert failed.value.exit_code == ExitCode.BAD_DATA
    assert (toy.folder / "zero" / "saved").exists() and toy.log.count("start samples") == 0
    assert (toy.states["helpfulness"], toy.states["zero"]) == ("failed", "missing")


def test_a_signal_ends_the_stages_that_run_and_the_recipe(toy: Toy) -> None:
    def send() -> None:
        while "start zero" not in (toy.log if (toy.folder / "log").exists() else []):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(StageFailed, match="stage zero ended with exit code 85") as failed:
        toy.run(zero={"seconds": 60})
    sender.join()
    assert failed.value.exit_code == ExitCode.REQUEUE and toy.log[-1] == "start zero"
