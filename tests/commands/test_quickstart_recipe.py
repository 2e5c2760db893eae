"""The whole recipe at toy length, as a person starts it: interrupted, killed, continued, repeated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.load import flat, load, read_yaml
from megatron_r1.files import read_json
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.runs.folder import is_done
from tests.support.jobs import comparable
from tests.support.recipes import DIES_WITHIN_S, SGLANG, Recipe, lives
from tests.support.recorded import unregistered

STOPPED_AT_A_CHECKPOINT = 85


def imports_torch(process: psutil.Process) -> bool:
    """Whether the process has begun to."""
    return any("libtorch" in one.path for one in process.memory_maps())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe that was warned by USR1 while its first stage imported torch, and then went through."""
    recipe = Recipe(tmp_path_factory.mktemp("finished"))
    with recipe.started() as process:
        deadline = time.monotonic() + 200
        while not any(map(imports_torch, process.children())) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(100) == STOPPED_AT_A_CHECKPOINT, recipe.log
    assert [row["step"] for row in recipe.rows("pretrain")] == [1]
    recipe.run(400)
    return recipe


@pytest.mark.timeout(600)
def test_the_recipe_survives_a_signal_and_ends_with_a_report(finished: Recipe) -> None:
    runs = finished.folder
    assert [row["step"] for row in finished.rows("pretrain")] == list(range(1, 7))
    assert [row["step"] for row in finished.rows("r1_zero")] == [1, 2, 3]
    assert not unregistered(finished.rows("pretrain"), "pretrain") and not unregistered(
        finished.rows("r1_zero"), "grpo"
    )
    assert list(finished.results["models"]) == ["base", "r1_zero"] and finished.results["prompts"] == 16
    assert "<html" in (runs / "report.html").read_text()
    assert (runs / "r1_zero" / "rollouts" / "step-00000003.rollout").exists()

    started = time.monotonic()
    finished.run(60)
    assert finished.log.count("done before") >= 4
    assert time.monotonic() - started < 20

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs / "convert" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 3?"}], tokenize=False)
    assert "2 + 3?" in chat


@pytest.mark.timeout(600)
def test_every_stage_was_composed_as_it_composed_itself(finished: Recipe) -> None:
    """What the recipe takes for a stage's settings is what the stage's own process had; nothing is left to run."""
    recipe = ComposedRecipe(load("pipeline", finished.command[6:], "quickstart"))
    for stage in recipe.stages.values():
        own = flat(read_yaml(stage.folder / "config.yaml"))
        assert {key: own[key] for key in stage.settings} == dict(stage.settings)
    assert recipe.left() == []
    record = read_json(finished.folder / "pipeline.json")
    assert [(stage["name"], stage["state"]) for stage in record["stages"]] == [(name, "done") for name in recipe.stages]
    assert all(stage["seconds"] > 0 and stage["started"] for stage in record["stages"])


def kill_at_random(recipe: Recipe, chance: random.Random, life: float, victims: list[str], attempt_s: float) -> str:
    """One start of the recipe, with one of its processes killed; says what was killed, or "" when it ended before."""
    victim, delay = chance.choice(victims), chance.uniform(0.0, life)
    with recipe.started() as parent:
        try:
            code = parent.wait(delay)
        except psutil.TimeoutExpired:
            target = victim_of(parent, victim, chance)
            below = [] if target == parent else target.children(recursive=True)
            known = [parent, *parent.children(recursive=True)]
            done = sum(is_done(recipe.folder / stage) for stage in ("pretrain", "r1_zero", "evaluate", "convert"))
            target.kill()
            killed = time.monotonic()
            if target == parent:
                seconds = recipe.seconds_until_gone(known, killed)
            else:  # what the victim had started dies with it; a recipe whose stage died notices and ends
                psutil.wait_procs(below, DIES_WITHIN_S)
                seconds = time.monotonic() - killed
                assert not [*filter(lives, below)]
                code = parent.wait(attempt_s)
                assert code or victim == "server", recipe.log  # a stage may start its server again
                recipe.seconds_until_gone(known, time.monotonic())
            left = f"{len(known)} processes, gone {seconds:.2f} s later"
            return f"{victim} after {delay:.1f} s, {done} stages done: {left}"
        assert code == 0, recipe.log
        return ""


def victim_of(parent: psutil.Popen, victim: str, chance: random.Random) -> psutil.Process:
    """The recipe's process, the stage that it runs now, or what that has started; the recipe's where there is none."""
    stages = parent.children()
    victims = {"parent": [], "stage": stages, "server": [child for stage in stages for child in stage.children()]}
    return chance.choice(victims[victim]) if victims[victim] else parent


def survive(recipe: Recipe, kills: int, seed: int, life: float, victims: list[str], attempt_s: float) -> list[str]:
    """Start the recipe again after each kill, until it has ended; start anew until there were so many kills."""
    chance, struck = random.Random(seed), list[str]()
    while len(struck) < kills and (what := kill_at_random(recipe, chance, life, victims, attempt_s)):
        struck.append(what)
    recipe.run(attempt_s)
    return struck


@pytest.mark.timeout(900)
def test_a_killed_recipe_leaves_no_process_and_resumes_to_the_same_end(finished: Recipe, tmp_path: Path) -> None:
    recipe = Recipe(tmp_path)
    struck = survive(recipe, kills=3, seed=1, life=12.0, victims=["parent", "stage"], attempt_s=400)
    print("\n".join(struck))
    assert struck
    for stage in ("pretrain", "r1_zero"):
        assert comparable(recipe.rows(stage)) == comparable(finished.rows(stage))
    assert recipe.results["models"] == finished.results["models"]


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victims", [["parent"], ["parent", "stage", "server"]], ids=["parent", "any process"])
def test_a_recipe_with_servers_leaves_nothing_when_killed(victims: list[str], tmp_path: Path) -> None:
    """Kills through pre-training, R1-Zero with a real SGLang server, evaluation with it, conversion and report."""
    calm, struck, runs, life = Recipe(tmp_path / "calm", tuple(SGLANG)), list[str](), 0, time.monotonic()
    calm.run(1200)
    life = time.monotonic() - life
    while len(struck) < 10:
        recipe, runs = Recipe(tmp_path / f"killed-{runs}", tuple(SGLANG)), runs + 1
        struck += survive(recipe, 10 - len(struck), 7 + runs, life / 2, victims, 1200)
        assert comparable(recipe.rows("pretrain")) == comparable(calm.rows("pretrain"))
        assert [row["step"] for row in recipe.rows("r1_zero")] == [1, 2, 3]
        assert recipe.results["models"].keys() == calm.results["models"].keys()
    print(f"an undisturbed recipe takes {life:.0f} s; {len(struck)} kills of {runs} recipes\n" + "\n".join(struck))


def test_a_run_refuses_another_configuration_and_names_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "short" / "pretrain"
    command = [sys.executable, "-m", "megatron_r1", "pretrain", f"root='{folder.parent}'", "name=pretrain"]
    from megatron_r1.config.load import write_yaml

    folder.mkdir(parents=True)
    write_yaml(load("pretrain", ["name=pretrain", f"root='{folder.parent}'"]), folder / "config.yaml")
    done = subprocess.run([*command, "seed=7", "platform=cpu"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "seed: 0 -> 7" in done.stderr and "Traceback" not in done.stderr
