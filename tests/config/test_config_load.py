"""Composition, strict conversion, the resolved YAML, and what a changed configuration looks like."""

from __future__ import annotations

import ast
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_r1.config
from megatron_r1.check.layout_files import layout_files, layout_jobs
from megatron_r1.config import recipes as recipes_module
from megatron_r1.config.load import difference, load, read_yaml, write_yaml
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.recipes import configs_folder, groups, recipes
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import convert, defaults, resolved
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.errors import ConfigError

CONFIG_FILES = sorted(Path(megatron_r1.config.__file__).parent.glob("*.py"))
NEEDS = {
    ("train", "pretrain_v3"): ["model.max_sequence_length=4096"],
    ("train", "pretrain_16b"): ["model.max_sequence_length=4096"],
    ("train", "sft_v3"): ["model.max_sequence_length=32768"],
    ("train", "sft_r1"): ["model.max_sequence_length=32768"],
    ("train", "reward_r1"): ["model.max_sequence_length=8192"],
    ("train", "distill_r1"): ["model.max_sequence_length=32768"],
    ("performance", "deepseek"): ["parallel.expert=2", "model.dtype=bf16"],
}
"""What an option asks of other sections, beyond the tiny model on one rank."""
JOBS = {
    override: job.command for path in layout_files() for job in layout_jobs(path) for override in job.command.overrides
}
"""An override -> a job that a layout is meant for and that has it."""
OPTIONS = [(group, option) for group, options in groups().items() for option in options]


@pytest.fixture
def own_configs(tmp_path, monkeypatch) -> Path:
    """A copy of the shipped YAML files where an installed package has them, for a test to break."""
    shutil.copytree(configs_folder(), tmp_path / "_configs")
    monkeypatch.setattr(recipes_module, "PACKAGE", tmp_path)
    assert configs_folder() == tmp_path / "_configs"
    return tmp_path / "_configs"


@pytest.mark.parametrize("recipe", recipes())
def test_shipped_recipe_composes(recipe):
    assert load("pretrain", [], recipe).name == recipe


def test_yaml_says_only_what_differs_from_the_class():
    """A value of a group's file that no other file of its own chain sets is never the class's default."""
    repeated = []
    for group, options in groups().items():
        fresh = resolved(RunConfig())[group]
        for option in options:
            tree = yaml.safe_load((configs_folder() / group / f"{option}.yaml").read_text()) or {}
            if "defaults" not in tree and group != "model":
                repeated += [f"{group}/{option}: {key}" for key in tree if key in fresh and tree[key] == fresh[key]]
    assert repeated == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_shipped_option_composes(group, option):
    alone = JobCommand("pretrain", "pretrain", (f"{group}={option}", *NEEDS.get((group, option), [])))
    command = JOBS.get(f"{group}={option}", alone) if group in ("parallel", "performance") else alone
    config = load(command.verb, command.overrides, command.recipe)
    assert resolved(config).keys() == defaults(RunConfig).keys()


@pytest.mark.parametrize("verb", VERBS)
def test_verb_has_a_recipe(verb):
    assert load(verb).name == VERBS[verb].recipe


def test_every_recipe_inherits_the_base_that_lists_every_group():
    text = (configs_folder() / "_base.yaml").read_text()
    assert "_base" not in recipes() and [group for group in groups() if f"  - {group}: " not in text] == []
    for recipe in recipes():
        assert "defaults:\n  - _base\n" in (configs_folder() / f"{recipe}.yaml").read_text(), recipe


def test_every_group_is_a_section_and_every_section_field_is_a_key():
    assert set(groups()) <= {field.name for field in fields(RunConfig)}
    tree = defaults(RunConfig)
    assert tree["model"].pop("attention") == {}  # one of two sections: either's keys would stand in the other's way
    assert convert(RunConfig, tree) == RunConfig()
    rest = resolved(RunConfig())
    assert rest["model"].pop("attention")["kind"] == "latent" and rest == tree


def test_tiny_is_the_default_model():
    assert load("pretrain", ["model=tiny"]).model == ModelConfig()


def test_overrides_reach_keys_that_no_yaml_names():
    config = load("grpo", ["init.from=runs/base", "rollout=local", "rollout.sglang.servers=2", "threads=1"])
    assert (config.init.from_, config.rollout.engine, config.rollout.sglang.servers) == ("runs/base", "local", 2)


def test_numbers_keep_their_value():
    config = load("pretrain", ["data.num_documents=1e5", "model.rope.base=10000", "train.schedule.learning_rate=1e-3"])
    assert config.data.num_documents == 100_000 and type(config.data.num_documents) is int
    assert type(config.model.rope.base) is float and config.train.schedule.learning_rate == 1e-3


def test_interpolation_sees_defaults():
    assert load("pretrain", ["data.vocab_size=${model.vocab_size}"]).data.vocab_size == 512


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluate.models.base='runs/a=b'", "evaluate.models.r1=x"],
        ["+evaluate.models.base='runs/a=b'", "++evaluate.models.r1=x"],
        ["evaluate.models={base:'runs/a=b',r1:x}"],
    ],
)
def test_dict_fields_take_new_names(overrides):
    assert load("evaluate", overrides).evaluate.models == {"base": "runs/a=b", "r1": "x"}


def test_pipeline_stages_can_be_added_changed_and_deleted():
    changes = [
        "pipeline.stages.again.verb=evaluate",
        "pipeline.stages.r1_zero.config=other",
        "~pipeline.stages.convert",
    ]
    stages = load("pipeline", changes).pipeline.stages
    assert list(stages) == ["pretrain", "r1_zero", "evaluate", "again"]
    assert (stages["again"].verb, stages["r1_zero"].config) == ("evaluate", "other")


@pytest.mark.parametrize("short", ["from=r1_zero", "until=r1_zero", "only=r1_zero", "dry_run=true", "show=list"])
def test_a_pipeline_takes_short_forms(short: str) -> None:
    pipeline, (key, _, value) = load("pipeline", [short]).pipeline, short.partition("=")
    assert str(resolved(pipeline)[key]).lower() == value
    with pytest.raises(ConfigError, match=f"^{key}={value}: no such key"):
        load("pretrain", [short])


def test_loading_leaves_no_global_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    load("pretrain")
    with pytest.raises(ConfigError):
        load("pretrain", ["track=gone"])
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path and dict(os.environ) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("model/small.yaml", "hidden_size: 512\n", "hiden_size: 512\n", "model.hiden_size=512: no such key"),
        ("model/small.yaml", "  top_k: 4\n", "  top_k: null\n", "model.moe.top_k=null: must be a whole number"),
        ("model/small.yaml", "  top_k: 4\n", "  top_k: ${gone}\n", "model.moe.top_k=${gone}: Interpolation key 'gone'"),
        ("model/small.yaml", "dtype: bf16", "dtype: [", "--config-name=pretrain: cannot be composed: "),
        ("_base.yaml", "  - model: tiny", "  - model: huge", "model=huge: no such file; "),
        ("pretrain.yaml", "name: pretrain", "1: pretrain", "1=pretrain: no such key"),
    ],
)
def test_broken_file_is_one_line(own_configs, file, old, new, message):
    text = (own_configs / file).read_text()
    assert old in text
    (own_configs / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load("pretrain", ["model=small"] if file.startswith("model") else [])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_override_that_hydra_cannot_merge_is_named():
    with pytest.raises(ConfigError, match="^track.wandb={null:2}: cannot be composed"):
        load("pretrain", ["track.wandb={null:2}"])


def test_group_that_a_recipe_leaves_out_is_refused_as_such(own_configs):
    text = (own_configs / "_base.yaml").read_text()
    (own_configs / "_base.yaml").write_text(text.replace("  - model: tiny\n", ""))
    assert load("pretrain").model == ModelConfig()
    with pytest.raises(ConfigError, match="^model=tiny: .*Could not override 'model'"):
        load("pretrain", ["model=tiny"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["", "+", "++", "~"]),
    st.sampled_from(
        ["model", "model.moe", "name", "pipeline.stages.x", "evaluate.models", "init.from", "@", "a.b", ""]
    ),
    st.text(alphabet="tiny=.:,{}[]()$'\"\\ ~@#?*1e-\n", max_size=8),
)
def test_any_override_is_a_config_or_one_config_error(prefix, key, value):
    try:
        assert isinstance(load("pipeline", [f"{prefix}{key}={value}"]), RunConfig)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_resolved_yaml_reads_back(tmp_path):
    config = load("pipeline", ["init.from=runs/base", "model.norm_epsilon=1e-7", "name='7'"])
    write_yaml(config, tmp_path / "config.yaml")
    tree = read_yaml(tmp_path / "config.yaml")
    assert tree == resolved(config) and tree["init"] == {"from": "runs/base", "weights": "model"}
    assert convert(RunConfig, tree) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["[1", "- a\n", ""])
def test_damaged_yaml_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config file"):
        read_yaml(tmp_path / "config.yaml")


def test_difference_names_every_changed_key():
    old = resolved(load("evaluate", ["evaluate.models.base=runs/a"]))
    new = resolved(load("evaluate", ["model.init_std=0.02", "evaluate.models.r1=runs/b"]))
    assert difference(old, old) == []
    assert difference(old, new) == [
        "model.init_std: 0.045 -> 0.02",
        "evaluate.models.base: 'runs/a' -> (absent)",
        "evaluate.models.r1: (absent) -> 'runs/b'",
    ]


def test_difference_between_a_section_and_none():
    assert difference({"a": {}}, {"a": {"b": 1}}) == ["a: {} -> (absent)", "a.b: (absent) -> 1"]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_field_has_a_docstring(path):
    silent = []
    for section in ast.parse(path.read_text()).body:
        if isinstance(section, ast.ClassDef):
            for statement, after in zip(section.body, [*section.body[1:], None], strict=True):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(statement, ast.AnnAssign) and not documented:
                    silent.append(f"{section.name}.{ast.unparse(statement.target)}")
    assert silent == []
