"""What is composed and parsed without Hydra is what Hydra composes and parses, in the same order."""

from __future__ import annotations

import json
import os
from itertools import cycle, islice
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config.composition import compose_plainly
from megatron_r1.config.hydra_composition import compose_by_hydra
from megatron_r1.config.load import load
from megatron_r1.config.overrides import parse_overrides, plain_value
from megatron_r1.config.recipes import groups, recipes
from megatron_r1.config.yaml_files import NeedsHydra
from megatron_r1.errors import ConfigError

VALUES = (
    "''", '""', "'a b'", "\"it's\"", "'[1]'", "", "[]", "[1,2.5,true,null,x]", "['b','c d']", "[[1],[2]]", "1e-4", "-0",
    "-1.50", "1E5", "TRUE", "Null", "Inf", "nan", "nullx", "true-x", "/tmp/x-1.y", "../b", "./c", "hf:x/y", "_x-",
    "a..b", "a/true/1.0", "0", "1e05",
)  # fmt: skip
HYDRA_ONLY = [
    ("pretrain.yaml", "  - _self_\n", "", "no _self_"),
    ("pretrain.yaml", "  - _self_\n", "  - optional model: tiny\n  - _self_\n", "a second option"),
    ("model/tiny.yaml", "", "# @package train\n", "another section"),
    ("train/pretrain_tiny.yaml", "steps: 1800", "steps: ${model.hidden_size}", "an interpolation"),
    ("pretrain.yaml", "name: pretrain", "name: pretrain\nname: pretrain", "twice"),
]
"""File, what is replaced in it by what, and what that is."""


def changed(*lines: str) -> list:
    return [override for line in lines for override in parse_overrides("pretrain", line)]


def rows() -> list[tuple[str, ...]]:
    """Recipes, each with an option of every group, so that every recipe and every option is in one of them."""
    columns = [recipes(), *groups().values()]
    length = max(map(len, columns))
    return list(zip(*(islice(cycle(column), length) for column in columns), strict=True))


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * bool(number % 5)) for number, row in enumerate(rows())]
)
def test_every_recipe_and_option_is_composed_as_by_hydra(row):
    recipe, *options = row
    chosen = [f"{group}={option}" for group, option in zip(groups(), options, strict=True)]
    values = ["train.steps=7", "pipeline.overrides=[a,b]", "init.from.below=1", "evaluate.models={a:b,c:d}"]
    overrides = changed(*chosen, *values)
    assert json.dumps(compose_plainly(recipe, overrides)) == json.dumps(compose_by_hydra(recipe, overrides))


@pytest.mark.parametrize("text", VALUES)
def test_everyday_values_are_parsed_as_by_hydra(text):
    assert repr(plain_value(text)) == repr(OverridesParser.create().parse_override(f"key={text}").value())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="tinyA_=.:,[]'\" -/e10+$", max_size=7))
def test_any_value_that_is_parsed_is_parsed_as_by_hydra(text):
    try:
        value = plain_value(text)
    except ValueError:
        return
    assert repr(value) == repr(OverridesParser.create().parse_override(f"key={text}").value())


def test_values_that_name_other_values_go_to_hydra():
    for line in ("train.steps=${seed}", "train.steps='${seed}'", "train.steps=???", "~pipeline.stages.x", "a.b={1:2}"):
        with pytest.raises((NeedsHydra, ConfigError)):
            compose_plainly("pretrain", changed(line))
    assert load("pretrain", ["train.steps='${seed}'", "seed=800"]).train.steps == 800


@pytest.mark.parametrize(("file", "old", "new", "what"), HYDRA_ONLY)
def test_other_forms_of_files_go_to_hydra(own_configs, file, old, new, what):
    text = (own_configs / file).read_text()
    assert old in text
    (own_configs / file).write_text(text.replace(old, new, 1))
    with pytest.raises(NeedsHydra):
        pytest.fail(f"composed in spite of {what}: {compose_plainly('pretrain', ())}")


def test_a_file_that_changes_is_read_again(own_configs):
    assert load("pretrain").name == "pretrain"
    file: Path = own_configs / "pretrain.yaml"
    stamp = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("name: pretrain", "name: changed"))
    os.utime(file, ns=(stamp + 1, stamp + 1))
    assert load("pretrain").name == "changed"
