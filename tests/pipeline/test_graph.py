"""Order of stages, selections, types of inputs, and the graph's pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.pipeline import PipelineConfig, StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.compose import compose_stages
from megatron_r1.pipeline.graph import as_text, in_order, mermaid, selected
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.settings import settings_of
from tests.support.pipelines import RECIPE, STAGES, composed, composing_once, recipe_config


@pytest.fixture(scope="module", autouse=True)
def composing() -> Iterator[None]:
    with composing_once():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all tests, so that the recipe need not be composed again for each."""
    return tmp_path_factory.mktemp("graph") / "x"


def stage(*needs: str, **settings) -> StageConfig:
    return StageConfig(verb="pretrain", needs=list(needs), **settings)


def test_a_stage_runs_after_what_it_needs_and_otherwise_in_the_recipes_order() -> None:
    stages = {"d": stage(), "c": stage("a", inputs={"x": "b"}), "b": stage("a"), "a": stage()}
    assert in_order(PipelineConfig(stages=stages)) == ["d", "a", "b", "c"]


@pytest.mark.parametrize("edges", [{"needs": ["b"]}, {"inputs": {"x": "b"}}])
def test_a_circle_is_refused(edges: dict) -> None:
    stages = {"a": StageConfig(verb="pretrain", **edges), "b": stage("a")}
    with pytest.raises(ConfigError, match="circle"):
        in_order(PipelineConfig(stages=stages))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({}, STAGES),
        ({"until": "samples"}, ("pretrain", "zero", "samples")),
        ({"from_": "cold_start"}, ("cold_start", "r1", "evaluate", "convert")),
        ({"from_": "helpfulness", "until": "r1"}, ("helpfulness", "r1")),
        ({"only": "r1"}, ("r1",)),
    ],
)
def test_from_until_and_only_choose_stages(choice: dict[str, str], names: tuple[str, ...], folder: Path) -> None:
    stages = recipe_config(folder).pipeline.stages
    assert tuple(selected(PipelineConfig(stages=stages, **choice))) == names


def test_a_start_that_the_end_does_not_depend_on_is_refused(folder: Path) -> None:
    stages = recipe_config(folder).pipeline.stages
    with pytest.raises(ConfigError, match="pipeline.from=helpfulness: must be a stage that until=zero depends on"):
        selected(PipelineConfig(stages=stages, from_="helpfulness", until="zero"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{base: pretrain, r1: r1}",
            "{base: helpfulness, r1: r1}",
            "evaluate.models.base takes a checkpoint or hf, and helpfulness is a reward_model",
        ),
        ("helpfulness: helpfulness}", "helpfulness: pretrain}", "helpfulness_model takes a reward_model, and pretrain"),
        ("'{policy}'\"]\n  cur", "'{gone}'\"]\n  cur", "{gone} must be one of policy"),
        ("{policy: zero}", "{policy: zero, base: pretrain}", "no override of the stage uses {base}"),
        (
            "data.prompts.path='PROMPTS'",
            "data.prompts.path='{base}'",
            "path takes a prompts or samples, and pretrain is a check",
        ),
        ("curated.conversations", "curated.prompts", "path takes a conversations, and curated.prompts is a prompts"),
        (
            "helpfulness: helpfulness}\n    overrides: [",
            "helpfulness: helpfulness, rows: curated.prompts}\n    overrides: [\"data.prompts.path='{rows}'\", ",
            "stage r1: inputs.rows=curated.prompts: curated makes conversations with its settings",
        ),
        ("sft.source=files", "rl.group_size=4", "sft never reads"),
        ("threads=1", "dpo.beta=1", "no stage of this recipe reads it"),
        (
            "reward.helpfulness=1",
            'reward.helpfulness=1", "rl.group_size=1',
            "stage r1: rl.group_size=1: must be at least 2",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(old: str, new: str, message: str, folder: Path) -> None:
    assert old in RECIPE
    with pytest.raises(ConfigError, match=message) as refused:
        composed(folder, RECIPE.replace(old, new, 1))
    assert "\n" not in str(refused.value)


def test_where_a_recipe_is_tracked_holds_for_its_stages(folder: Path) -> None:
    notes = "a 'quoted' text, of {x: 1}"
    given = ("track.wandb=offline", "track.tags=[a,'b c']", 'track.notes="' + notes.replace("\\", "\\\\") + '"')
    settings = composed(folder, overrides=given).stages["r1"].settings
    assert (settings["track.wandb"], settings["track.tags"], settings["track.notes"]) == (
        "offline",
        ["a", "b c"],
        notes,
    )
    assert settings["track.group"] == folder.name


def test_a_stage_is_composed_with_the_paths_and_the_model_of_its_inputs(folder: Path) -> None:
    common = ("parallel.tensor=2",)
    stages = composed(folder, overrides=common).stages
    pretrain, r1 = stages["pretrain"], stages["r1"]
    assert f"init.from='{folder}/cold_start'" in r1.arguments
    assert r1.arguments[-4:] == ("threads=1", "seed=0", "platform=cpu", "parallel.tensor=2") and r1.ranks == 2
    assert f"track.group='{folder.name}'" in r1.arguments, "a recipe is a group in wandb"
    assert not any("track." in line for line in stages["evaluate"].arguments)
    assert stages["evaluate"].ranks == 1 and "parallel.tensor=2" not in stages["evaluate"].arguments
    assert stages["samples"].path_of("samples").endswith("x/samples/samples.jsonl")
    assert stages["convert"].path_of("hf") == f"hf:{folder}/convert/hf"
    assert r1.settings["model.hidden_size"] == pretrain.model.hidden_size == r1.model.hidden_size


def test_a_stage_is_composed_alone_with_what_it_needs(folder: Path) -> None:
    config = recipe_config(folder)
    whole, some = compose_stages(config, folder), compose_stages(config, folder, ["samples"])
    assert list(some) == ["pretrain", "zero", "samples"] and all(some[name] == whole[name] for name in some)


def test_a_stage_added_on_the_command_line_averages_two_others(folder: Path) -> None:
    added = (
        "pipeline.stages.mean={verb:average,inputs:{zero:r1_zero,base:pretrain},"
        'overrides:["average.models.zero=\'{zero}\'","average.models.base=\'{base}\'","average.weights.zero=3"]}'
    )
    command = [f"root='{folder.parent}'", "name=with_mean", "platform=cpu", added]
    mean = ComposedRecipe(load("pipeline", command, "quickstart")).stages["mean"]
    runs = folder.parent / "with_mean"
    models = {name: mean.settings[f"average.models.{name}"] for name in ("zero", "base")}
    assert models == {"zero": str(runs / "r1_zero"), "base": str(runs / "pretrain")}
    assert mean.settings["average.weights.zero"] == 3
    assert [output.stage for output in mean.inputs.values()] == ["r1_zero", "pretrain"]


def test_a_later_stage_has_the_model_of_the_first(folder: Path) -> None:
    text = RECIPE.replace("verb: pretrain\n", 'verb: pretrain\n    overrides: ["model.num_layers=2"]\n')
    assert {stage.model.num_layers for stage in composed(folder, text).stages.values()} == {2}


def test_the_table_says_what_each_stage_does(folder: Path) -> None:
    text = RECIPE.replace('reward.helpfulness=1"', 'reward.helpfulness=1", routing=frozen, rl.clip_epsilon=10', 1)
    rows = {name: settings_of(stage) for name, stage in composed(folder, text).stages.items()}
    column = {key: {name: row[key] for name, row in rows.items()} for key in rows["r1"]}
    assert column["router policy"]["pretrain"] == "trained, bias 0.001, sequence loss 0.0001"
    assert column["router policy"]["zero"] == "trained, no balancing"
    assert column["router policy"]["r1"] == "frozen, no balancing"
    assert (
        column["multi-token prediction"]["pretrain"]
        == column["multi-token prediction"]["cold_start"]
        == "1, weight 0.3"
    )
    assert column["multi-token prediction"]["zero"] == "1, not trained" and column["router policy"]["curated"] == ""
    assert (column["clip"]["zero"], column["clip"]["r1"], column["clip"]["cold_start"]) == ("0.2", "10", "")
    assert column["rewards"]["r1"].endswith("helpfulness 1") and column["reference reset"]["r1"] == "every 25 steps"
    assert column["starts from"]["evaluate"] == "pretrain, r1" and column["starts from"]["pretrain"] == "random"
    assert column["data"]["cold_start"] == "curated.conversations; files"


def test_the_graph_is_drawn_as_text_and_as_mermaid(folder: Path) -> None:
    pipeline = recipe_config(folder).pipeline
    states = dict.fromkeys(STAGES, "missing") | {"pretrain": "done"}
    text, drawn = as_text(pipeline, states), mermaid(pipeline, states)
    assert "pretrain (pretrain): done" in text and "  <- cold_start.checkpoint as policy" in text
    assert "  <- after evaluate" in text
    assert "  cold_start -->|checkpoint| r1" in drawn and "  helpfulness -->|reward_model| r1" in drawn
    assert "  evaluate -.-> convert" in drawn and 'pretrain["pretrain<br/>pretrain"]:::done' in drawn
    edges = [line for line in drawn.splitlines() if re.search(r"-->|-\.->", line)]
    assert len(edges) == 12
