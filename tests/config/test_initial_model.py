"""A model that `init.from` names is named once: its shape is the weights', and overrides are what may differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_r1.checkpoint.manifest import write_manifest
from megatron_r1.config.initial_model import TRAINING
from megatron_r1.config.load import load, load_all, resolved
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import CheckpointDamaged, ConfigError
from megatron_r1.hf.config import hf_config
from megatron_r1.runs.source import find_model

DENSE = replace(load("grpo", ["model=tiny_dense"]).model, hidden_size=96, ffn_hidden_size=160, init_std=0.02)
SPARSE = replace(load("grpo").model, num_layers=6, vocab_size=1024)
VERBS = ("pretrain", "sft", "grpo", "reward_model", "dpo", "convert")


def model_after(
    *overrides: str, found: ModelConfig = DENSE, verb: str = "grpo", recipe: str | None = None
) -> ModelConfig:
    return load_all(verb, ["init.from=base", *overrides], recipe or None, lambda _: found).config.model


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("found", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_initial_weights_alone_name_the_model(verb: str, found: ModelConfig) -> None:
    tree, expected = (resolved(model) for model in (model_after(found=found, verb=verb), found))
    for section, key in (key.split(".") for key in TRAINING):
        del tree[section][key], expected[section][key]
    assert tree == expected


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.max_sequence_length=128", "max_sequence_length", 128),
        ("++model.max_sequence_length=200", "max_sequence_length", 200),
        ("model.dtype=bf16", "dtype", "bf16"),
        ("model.init_std=0.03", "init_std", 0.03),
        ("model.hidden_size=96", "hidden_size", 96),
    ],
)
def test_an_override_of_what_may_differ_or_does_not_differ_is_taken(override: str, key: str, value: object) -> None:
    model = model_after(override)
    assert getattr(model, key) == value and model.ffn_hidden_size == DENSE.ffn_hidden_size


def test_positions_are_extended_key_by_key_or_as_a_section() -> None:
    keys = ["model.rope.scaling=llama3", "model.rope.factor=4", "model.rope.original_max_position=256"]
    extended = model_after(*keys, "model.max_sequence_length=1024")
    assert (extended.rope.factor, extended.max_sequence_length, extended.hidden_size) == (4, 1024, 96)
    section = "model.rope={scaling:llama3,factor:4,original_max_position:256}"
    assert model_after(section, "model.max_sequence_length=1024") == extended


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", "model.hidden_size=64: must be 96, as in base; only dtype, max_sequence_length"),
        ("model.attention.kind=latent", "model.attention.kind=latent: must be grouped, as in base"),
        ("model.attention.q_lora_rank=3", "model.attention.q_lora_rank=3: the model of base has no such key"),
        ("model.attention={head_dim:64}", "model.attention.head_dim=64: must be 32, as in base"),
        ("model.hiden_size=96", "model.hiden_size=96: no such key; did you mean model.hidden_size?"),
        ("model.rope.base=3", "model.rope.base=3.0: must be"),
        ("model.max_sequence_length=100000", "model.max_sequence_length=100000: must be at most"),
        ("model=tiny", "model.num_layers="),
        ("model.mtp.num_layers=1", "model.mtp.num_layers=1: must be 0, as in base"),
    ],
)
def test_an_override_of_what_must_not_differ_is_refused_by_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        model_after(override, found=replace(DENSE, num_layers=3))
    assert str(refused.value).startswith(message)


def test_multi_token_layers_may_be_left_out_and_nothing_else_of_them_changes() -> None:
    assert model_after("model.mtp.num_layers=0", found=SPARSE).mtp.num_layers == 0
    with pytest.raises(ConfigError, match=r"^model\.mtp\.num_layers=2: must be 1, as in base"):
        model_after("model.mtp.num_layers=2", found=SPARSE)


@pytest.mark.parametrize("override", ["model.max_sequence_length=128", "model.dtype=bf16", "model.rope.factor=2"])
def test_a_conversion_changes_nothing_else_of_a_model(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.\S+: must be \S+, as in base$"):
        model_after(override, verb="convert")
    assert model_after("model.mtp.num_layers=0", found=SPARSE, verb="convert").mtp.num_layers == 0


def test_a_recipe_of_another_shape_gives_what_it_sets_itself() -> None:
    """The group that a recipe chooses is replaced; the keys of its own file are overrides."""
    found = replace(load("pretrain", ["model=v3_proxy"]).model, num_layers=5, max_sequence_length=4096)
    model = model_after(found=found, verb="pretrain", recipe="context_32k")
    assert (model.num_layers, model.max_sequence_length, model.rope.factor) == (5, 32768, 40.0)
    longer = model_after("model.max_sequence_length=65536", found=found, verb="pretrain", recipe="context_32k")
    assert longer == replace(model, max_sequence_length=65536)


def test_how_a_model_is_trained_is_not_taken_from_weights() -> None:
    found = replace(SPARSE, mtp=replace(SPARSE.mtp, loss_coefficient=0.0))
    assert model_after(found=found, verb="pretrain").mtp.loss_coefficient == load("pretrain").model.mtp.loss_coefficient
    assert model_after("model.mtp.loss_coefficient=0.7", found=found, verb="pretrain").mtp.loss_coefficient == 0.7


def test_checks_of_several_sections_see_the_model_of_the_weights() -> None:
    with pytest.raises(
        ConfigError, match=r"^train\.sequence_length=\d+: must be at most model\.max_sequence_length=64"
    ):
        model_after(verb="sft", found=replace(DENSE, max_sequence_length=64))
    assert model_after(found=replace(DENSE, max_sequence_length=131072)).max_sequence_length == 131072


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder `hf` of the dense model, and a run `run` of the sparse one with two checkpoints."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps(hf_config(DENSE)))
    for step in (1, 2):
        checkpoint = folder / f"run/checkpoints/step-{step:08}"
        checkpoint.mkdir(parents=True)
        write_manifest(checkpoint, {"config": {"model": resolved(SPARSE)}})
    (folder / "broken/checkpoints/step-00000001").mkdir(parents=True)
    return folder


def test_a_folder_a_run_and_a_checkpoint_name_their_model(sources: Path) -> None:
    found = find_model(f"hf:{sources}/hf")
    assert replace(found, moe=DENSE.moe, mtp=DENSE.mtp, rope=DENSE.rope) == DENSE
    assert find_model(f"{sources}/run") == find_model(f"{sources}/run/checkpoints/step-00000001") == SPARSE


@pytest.mark.parametrize("name", ["hf:nothing", "nothing", "hf:run", "hf"])
def test_what_names_no_model_is_refused(name: str, sources: Path) -> None:
    source = f"hf:{sources}/{name[3:]}" if name.startswith("hf:") else f"{sources}/{name}"
    with pytest.raises(ConfigError, match=r"^init\.from=\S+: must be a "):
        find_model(source)


def test_a_run_without_a_whole_manifest_is_damaged(sources: Path) -> None:
    with pytest.raises(CheckpointDamaged):
        find_model(f"{sources}/broken")


def test_cfg_job_says_where_each_value_is_from_without_torch(sources: Path, run_command, hydra_seconds) -> None:
    done = run_command("sft", "--cfg", "job", "init.from=hf:hf", "model.max_sequence_length=256", cwd=sources)
    assert (done.status, done.stderr) == (0, "") and done.processor_seconds < 5 * hydra_seconds
    assert yaml.safe_load(done.stdout)["model"]["ffn_hidden_size"] == 160
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "ffn_hidden_size: 160  # init.from=hf:hf" in lines and "max_sequence_length: 256  # command line" in lines
