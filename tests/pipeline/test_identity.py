"""What changes a stage's identity, and what does not: composed and compared, without running a stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_r1.config import recipes as recipes_module
from megatron_r1.config.recipes import configs_folder
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.state import RECORD, prepare_folder
from megatron_r1.runs.folder import mark_done
from tests.support.pipelines import RECIPE, STAGES, composed, composing_once

BEHIND_R1 = ("r1", "evaluate", "convert")
BEHIND_COLD_START = ("cold_start", *BEHIND_R1)
BEHIND_SAMPLES = ("samples", "curated", *BEHIND_COLD_START)
BEHIND_ZERO = ("zero", *BEHIND_SAMPLES)


@pytest.fixture(scope="module", autouse=True)
def own_configs(tmp_path_factory: pytest.TempPathFactory):
    """A copy of the shipped YAML files for a test to change."""
    package = tmp_path_factory.mktemp("package")
    shutil.copytree(configs_folder(), package / "_configs")
    with pytest.MonkeyPatch.context() as patch, composing_once():
        patch.setattr(recipes_module, "PACKAGE", package)
        yield package / "_configs"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose stages are all done."""
    folder = tmp_path_factory.mktemp("recipe") / "small"
    for name in ("prompts", "rows"):
        (folder.parent / name).write_text(f"{name}\n")
    recipe = composed(folder)
    for name, stage in recipe.stages.items():
        prepare_folder(stage, recipe.identities[name])
        mark_done(stage.folder, {})
    assert set(composed(folder).state_names().values()) == {"done"}
    return folder


def rerun(recipe: ComposedRecipe) -> tuple[str, ...]:
    return tuple(recipe.left())


Change = Callable[[Path], ComposedRecipe]


def text(*pairs: str) -> Change:
    """The recipe with texts of its YAML replaced: old, new, old, new, ..."""
    changed = RECIPE
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in changed
        changed = changed.replace(old, new, 1)
    return lambda folder: composed(folder, changed)


def common(*lines: str) -> Change:
    """The recipe with further overrides of all stages."""
    return text("[threads=1]", f"[threads=1, {', '.join(lines)}]")


def command_line(*overrides: str) -> Change:
    """The recipe with overrides of the pipeline itself."""
    return lambda folder: composed(folder, overrides=overrides)


def rows(name: str, content: str) -> Change:
    """The recipe with another content of a file that it names, which is put back afterwards."""
    return lambda folder: with_content(folder.parent / name, lambda _: content, folder)


def config_file(name: str, edit: Callable[[str], str]) -> Change:
    """The recipe with another content of a YAML file in configs/, which is put back afterwards."""
    return lambda folder: with_content(configs_folder() / name, edit, folder)


def with_content(path: Path, edit: Callable[[str], str], folder: Path) -> ComposedRecipe:
    before = path.read_text()
    assert edit(before) != before
    path.write_text(edit(before))
    try:
        return composed(folder)
    finally:
        path.write_text(before)


def same_rows_elsewhere(folder: Path) -> ComposedRecipe:
    shutil.copy(folder.parent / "rows", folder.parent / "other_rows")
    return text("ROWS", "ROWS", "'ROWS'", f"'{folder.parent / 'other_rows'}'")(folder)


def moved(folder: Path) -> ComposedRecipe:
    """The recipe in a folder of another name."""
    shutil.copytree(folder, folder.parent / "other name")
    return composed(folder.parent / "other name")


CHANGES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "weight of a reward": (text("reward.helpfulness=1", "reward.helpfulness=2"), BEHIND_R1),
    "weight in a preset": (
        config_file("reward/basic.yaml", lambda old: f"{old}format: 0.2\n"),
        BEHIND_ZERO,
    ),
    "weight in a verb's recipe": (
        config_file("r1_zero.yaml", lambda old: f"{old}  repetition: 0.5\n"),
        BEHIND_ZERO,
    ),
    "content of prompts": (rows("prompts", "others"), BEHIND_ZERO),
    "content of conversations": (rows("rows", "others"), BEHIND_COLD_START),
    "data size of sampling": (
        text("'{policy}'\"]\n  cur", "'{policy}'\", sample.max_prompts=7]\n  cur"),
        BEHIND_SAMPLES,
    ),
    "data size of pre-training": (common("data.num_documents=5000"), STAGES),
    "data size of a reward model": (common("reward_model.num_examples=99"), ("helpfulness", *BEHIND_R1)),
    "text of a prompt style": (config_file("prompt_style/plain.txt", lambda old: f"Think. {old}"), BEHIND_SAMPLES),
    "epochs of fine-tuning": (text('sft.source=files"', 'sft.source=files", sft.epochs=3'), BEHIND_COLD_START),
    "filter of curation": (common("curate.limits.language_share=0.5"), ("curated", *BEHIND_COLD_START)),
    "objective": (common("rl.kl_coefficient=0.5"), BEHIND_ZERO),
    "temperature": (common("rollout.temperature=0.7"), BEHIND_ZERO),
    "size of an evaluation": (common("evaluate.num_prompts=9"), ("evaluate",)),
    "format of the export": (common("convert.dtype=bf16"), ("convert",)),
    "seed": (command_line("seed=1"), STAGES),
    "shape of the model": (
        config_file("model/tiny.yaml", lambda old: f"{old}num_layers: 2\n"),
        STAGES,
    ),
    "where a stage starts": (text("{policy: cold_start,", "{policy: zero,"), BEHIND_R1),
}
NO_CHANGES: dict[str, Change] = {
    "nothing": composed,
    "threads": text("threads=1", "threads=2"),
    "tracking": common("track=off"),
    "name of the recipe's folder": moved,
    "stages side by side": text("stages:", "workers: 3\nstages:"),
    "ranks": text("stages:", "ranks: 2\nstages:"),
    "parallelism": command_line("parallel.tensor=2"),
    "platform": command_line("platform=auto"),
    "comments in the recipe": text("stages:", "# Stages.\nstages:  # all of them"),
    "comments in a preset": config_file("reward/basic.yaml", lambda old: f"# More.\n{old}"),
    "order of keys in the recipe": text("{base: pretrain, r1: r1}", "{r1: r1, base: pretrain}"),
    "order of keys in a preset": config_file("train/grpo_tiny.yaml", lambda old: f"log_interval: 5\n{old[:-16]}\n"),
    "name of an input": text("{policy: cold_start,", "{x: cold_start,", "'{policy}'\", \"reward", "'{x}'\", \"reward"),
    "order alone": text("needs: [evaluate]", "needs: [samples]"),
    "intervals of logs and checkpoints": common("train.log_interval=1", "train.save_interval=3"),
    "size of servers": common("rollout.sglang.max_total_tokens=4096"),
    "a default that is spelt out": common("sample.samples_per_prompt=4"),
    "another form of a number": text("reward.helpfulness=1", "reward.helpfulness=1.0"),
    "path of a file": same_rows_elsewhere,
    "workers of a verifier": common("reward.math.workers=1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reruns_the_stages_behind_it_and_no_other(change: str, done: Path) -> None:
    make, expected = CHANGES[change]
    recipe = make(done)
    assert tuple(recipe.left()) == expected
    assert all(recipe.states[name].state == "stale" and recipe.states[name].why for name in expected)


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_leaves_results_the_same_reruns_nothing(change: str, done: Path) -> None:
    recipe = NO_CHANGES[change](done)
    assert recipe.left() == []


def test_the_reason_names_the_key_the_file_or_the_input(done: Path) -> None:
    states = text("reward.helpfulness=1", "reward.helpfulness=2")(done).states
    assert states["r1"].why == "reward.helpfulness: 1.0 -> 2.0"
    assert states["evaluate"].why == "input r1: r1 changed"
    assert "data.prompts.path: sha256:" in rows("prompts", "others")(done).states["zero"].why


def test_a_replaced_run_comes_back_with_its_identity(done: Path) -> None:
    changed = text("reward.helpfulness=1", "reward.helpfulness=2")
    stage, identity = (lambda recipe: (recipe.stages["r1"], recipe.identities["r1"]))(changed(done))
    first = (done / "r1" / RECORD).read_text()
    prepare_folder(stage, identity)
    assert len(list((done / "replaced").iterdir())) == 1 and (done / "r1" / RECORD).read_text() != first
    assert changed(done).states["r1"].why == "interrupted; resumes"
    before = composed(done)
    assert before.states["r1"].state == "stale"
    prepare_folder(before.stages["r1"], before.identities["r1"])
    assert composed(done).left() == [] and (done / "r1" / RECORD).read_text() == first
    assert [path.name[:3] for path in (done / "replaced").iterdir()] == ["r1-"]
    shutil.rmtree(done / "replaced")


def test_a_run_without_a_record_is_stale_and_is_kept_aside(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "small")
    for name in ("prompts", "rows"):
        shutil.copy(done.parent / name, tmp_path / name)
    (tmp_path / "small" / "convert" / RECORD).unlink()
    recipe = composed(tmp_path / "small")
    assert recipe.left() == ["convert"] and "no record" in recipe.states["convert"].why
    prepare_folder(recipe.stages["convert"], recipe.identities["convert"])
    assert (tmp_path / "small" / "replaced" / "convert-unrecord" / "done.json").exists()


@pytest.mark.parametrize("choice", ["only=evaluate", "from=evaluate"])
def test_a_selection_whose_inputs_are_not_done_is_refused(choice: str, done: Path) -> None:
    key, _, stage = choice.partition("=")
    recipe = text("reward.helpfulness=1", "reward.helpfulness=2", "stages:", f"{key}: {stage}\nstages:")(done)
    with pytest.raises(ConfigError, match=f"pipeline.{key}=evaluate: evaluate needs r1, which is not done"):
        recipe.check_selection()
