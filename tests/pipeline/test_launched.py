"""A stage whose ranks a launcher has started: rank 0 keeps the recipe, the others wait for it and become the stage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.files import read_json
from megatron_r1.pipeline.launched import leading
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.run import RecipeRun
from tests.support.pipelines import RECIPE, composed

STAGE = r"""
import os, pathlib, sys, time
folder = pathlib.Path(dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)["root"].strip("'"), "pretrain")
(folder / f"rank-{os.environ['RANK']}").write_text(f"{os.getpid()} {os.environ['WORLD_SIZE']} {sys.argv[1]}")
while len(list(folder.glob("rank-*"))) < 2:
    time.sleep(0.02)
(folder / "done.json").write_text("{}")
"""
OTHER_RANK = f"""
import sys
from megatron_r1.config.load import load
from megatron_r1.pipeline import launched
launched.PROGRAM = (sys.executable, "-c", {STAGE!r})
config = load("pipeline", [f"root={{sys.argv[1]}}", "name=recipe", "pipeline.only=pretrain"])
print("looks", flush=True)
launched.follow(config)
"""
TWO_RANKS = RECIPE.replace("    verb: pretrain\n", "    verb: pretrain\n    ranks: 2\n", 1)
LAUNCH = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def recipe_of(folder: Path, text: str = TWO_RANKS) -> ComposedRecipe:
    for name in ("prompts", "rows"):
        (folder.parent / name).touch()
    folder.mkdir(exist_ok=True)
    return composed(folder, text.replace("stages:", "only: pretrain\nstages:", 1))


@pytest.fixture
def rank_zero(monkeypatch, tmp_path):
    """This process as rank 0; each start has a port of its own."""
    for name, value in (LAUNCH | {"RANK": "0", "MASTER_PORT": "29999"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatron_r1.pipeline.launched.PROGRAM", (sys.executable, "-c", STAGE))
    return tmp_path / "recipe"


def test_all_ranks_run_the_stage_once_rank_0_has_prepared_it(rank_zero, monkeypatch):
    recipe = recipe_of(rank_zero)
    files = [recipe.folder / "pretrain" / f"rank-{rank}" for rank in (0, 1)]
    command = [sys.executable, "-c", OTHER_RANK, str(rank_zero.parent)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for port, runs in (("29999", True), ("29998", False)):  # a second start finds the stage done
        monkeypatch.setenv("MASTER_PORT", port)
        with subprocess.Popen(command, env={**os.environ, "RANK": "1"}, text=True, **pipes) as other:
            try:
                assert other.stdout.readline() == "looks\n"
                time.sleep(0.5)
                assert other.poll() is None and not files[1].exists(), "it waits for rank 0"
                with leading(recipe) as start:
                    RecipeRun(recipe, 1, lambda: None, start).run()
                _, error = other.communicate(timeout=30)
                assert other.returncode == 0, error
            finally:
                other.kill()
        assert [file.exists() for file in files] == [runs, runs]
        if runs:
            assert files[1].read_text().split() == [str(other.pid), "2", "pretrain"], "it has become the stage"
            assert files[0].read_text().split()[1:] == ["2", "pretrain"]
            assert recipe.states["pretrain"].state == "done" and read_json(recipe.folder / "pretrain" / "stage.json")
        for file in files:
            file.unlink(missing_ok=True)


def test_ranks_that_do_not_fit_the_stage_are_refused(rank_zero):
    recipe = recipe_of(rank_zero, RECIPE)
    with pytest.raises(ConfigError, match=r"pipeline.stages.pretrain.ranks=1: must be 2"), leading(recipe):
        pass
    recipe.config.only = ""
    with pytest.raises(ConfigError, match=r"pipeline.only=: must name one stage"), leading(recipe):
        pass
