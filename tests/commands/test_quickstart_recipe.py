"""The whole recipe at toy length, as a person starts it: interrupted, killed, continued, repeated.

One recipe runs always, and is disturbed at three places; the long form kills several at any.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.load import flat, load, read_yaml, write_yaml
from megatron_r1.files import read_json
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.runs.folder import is_done
from tests.support.fork_server import run_forked, run_forked_to_the_end
from tests.support.jobs import comparable
from tests.support.recipes import DIES_WITHIN_S, SGLANG, Recipe, lives
from tests.support.recorded import unregistered

STOPPED_AT_A_CHECKPOINT = 85


def imports_torch(process: psutil.Process) -> bool:
    """Whether the process has begun to."""
    return any("libtorch" in one.path for one in process.memory_maps())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The runs of its stages alone, each by its own command, which nothing disturbs."""
    recipe = Recipe(tmp_path_factory.mktemp("undisturbed"))
    stages = ComposedRecipe(load("pipeline", recipe.command[6:], "quickstart")).stages
    for name in ("pretrain", "r1_zero", "evaluate"):
        run_forked_to_the_end("megatron_r1", *stages[name].arguments)
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe that was warned by USR1 while its first stage imported torch, killed in that stage after a checkpoint,
    lost its second stage to a kill, and then went through.
    """
    recipe = Recipe(tmp_path_factory.mktemp("finished"))
    with recipe.started() as process:
        wait_until(lambda: any(map(imports_torch, process.children())), process)
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(300) == STOPPED_AT_A_CHECKPOINT, recipe.log
    assert [row["step"] for row in recipe.rows("pretrain")] == [1]
    for victim, stage, step in (("parent", "pretrain", 3), ("stage", "r1_zero", 1)):
        with recipe.started() as process:
            wait_until(lambda stage=stage, step=step: len(recipe.rows(stage)) >= step, process)  # type: ignore[misc]
            print(f"{victim} killed, {kill(recipe, process, victim_of(process, victim, random.Random(0)), 300)}")
    recipe.run(400)
    return recipe


def wait_until(condition: Callable[[], bool], process: psutil.Popen, deadline_s: float = 200) -> None:
    """Return once the condition holds, which it must before the process ends."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_the_recipe_survives_a_signal_and_kills_and_ends_with_a_report(finished: Recipe) -> None:
    runs = finished.folder
    assert [row["step"] for row in finished.rows("pretrain")] == list(range(1, 7))
    assert [row["step"] for row in finished.rows("r1_zero")] == [1, 2, 3]
    assert not unregistered(finished.rows("pretrain"), "pretrain") and not unregistered(
        finished.rows("r1_zero"), "grpo"
    )
    assert list(finished.results["models"]) == ["base", "r1_zero"] and finished.results["prompts"] == 16
    assert "<html" in (runs / "report.html").read_text()
    assert (runs / "r1_zero" / "rollouts" / "step-00000003.rollout").exists()

    before = finished.log.count("done before")
    finished.run(60)
    assert finished.log.count("done before") == before + 4, "nothing is left to run"

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
            done = sum(is_done(recipe.folder / stage) for stage in ("pretrain", "r1_zero", "evaluate", "convert"))
            killed = kill(recipe, parent, victim_of(parent, victim, chance), attempt_s, survived=victim == "server")
            return f"{victim} after {delay:.1f} s, {done} stages done: {killed}"
        assert code == 0, recipe.log
        return ""


def kill(recipe: Recipe, parent: psutil.Popen, target: psutil.Process, attempt_s: float, survived: bool = False) -> str:
    """Kill a process of the recipe, which ends by itself then and leaves nothing; says how fast.

    Args:
        survived: the recipe may do without, as a stage that starts its server again.
    """
    below = [] if target == parent else target.children(recursive=True)
    known = [parent, *parent.children(recursive=True)]
    target.kill()
    killed = time.monotonic()
    if target == parent:
        seconds = recipe.seconds_until_gone(known, killed)
    else:  # what the victim had started dies with it; a recipe whose stage died notices and ends
        psutil.wait_procs(below, DIES_WITHIN_S)
        seconds = time.monotonic() - killed
        assert not [*filter(lives, below)]
        code = parent.wait(attempt_s)
        assert code or survived, recipe.log
        recipe.seconds_until_gone(known, time.monotonic())
    return f"{len(known)} processes, gone {seconds:.2f} s later"


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
def test_a_killed_recipe_ends_as_one_that_nothing_disturbs(finished: Recipe, undisturbed: Recipe) -> None:
    for stage in ("pretrain", "r1_zero"):
        assert comparable(finished.rows(stage)) == comparable(undisturbed.rows(stage))
    assert finished.results["models"] == undisturbed.results["models"]


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
    command = ["name=pretrain", f"root='{folder.parent}'"]
    folder.mkdir(parents=True)
    write_yaml(load("pretrain", command), folder / "config.yaml")
    done = run_forked("megatron_r1", "pretrain", *command, "seed=7", "platform=cpu")
    assert done.returncode == 2
    assert "seed: 0 -> 7" in done.stderr and "Traceback" not in done.stderr
