"""A small recipe with an edge of every kind, composed but not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_r1.config import load as load_module
from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.load import load
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.recipes import configs_folder
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import convert
from megatron_r1.pipeline.recipe import ComposedRecipe

RECIPE = """
overrides: [threads=1]
stages:
  pretrain:
    verb: pretrain
  helpfulness:
    verb: reward_model
    inputs: {base: pretrain}
    overrides: ["init.from='{base}'"]
  zero:
    verb: grpo
    inputs: {base: pretrain}
    overrides: ["init.from='{base}'", "data.prompts.path='PROMPTS'"]
  samples:
    verb: sample
    inputs: {policy: zero}
    overrides: ["init.from='{policy}'"]
  curated:
    verb: curate
    inputs: {samples: samples}
    overrides: ["curate.sources.zero.path='{samples}'"]
  cold_start:
    verb: sft
    inputs: {base: pretrain, rows: curated.conversations}
    overrides: ["init.from='{base}'", "sft.source=files", "sft.datasets.worked.path='ROWS'",
                "sft.datasets.curated.path='{rows}'"]
  r1:
    verb: grpo
    inputs: {policy: cold_start, helpfulness: helpfulness}
    overrides: ["init.from='{policy}'", "reward.helpfulness_model='{helpfulness}'", "reward.helpfulness=1"]
  evaluate:
    verb: evaluate
    inputs: {base: pretrain, r1: r1}
    overrides: ["evaluate.models.base='{base}'", "evaluate.models.r1='{r1}'"]
  convert:
    verb: convert
    inputs: {policy: r1}
    needs: [evaluate]
    overrides: ["init.from='{policy}'"]
"""
STAGES = ("pretrain", "helpfulness", "zero", "samples", "curated", "cold_start", "r1", "evaluate", "convert")


def recipe_config(folder: Path, text: str = RECIPE, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The configuration of a recipe that is written as YAML, with its runs in `folder`."""
    config = load("pipeline", [f"root='{folder.parent}'", f"name={folder.name}", "platform=cpu", *overrides])
    for name in ("PROMPTS", "ROWS"):
        text = text.replace(name, str(folder.parent / name.lower()))
    config.pipeline = convert(PipelineConfig, yaml.safe_load(text))
    return config


@contextlib.contextmanager
def composing_once() -> Iterator[None]:
    """Hydra composes one recipe under the same overrides once, as long as no file in configs/ changes."""
    compose, known = load_module._compose, {}

    def remembered(recipe: str, overrides: list[str]) -> dict[str, Any]:
        stamps = tuple((path, path.stat().st_mtime_ns) for path in sorted(configs_folder().rglob("*.yaml")))
        key = (recipe, tuple(overrides), stamps)
        known[key] = known.get(key) or compose(recipe, overrides)
        return deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "_compose", remembered)
        yield


def composed(folder: Path, text: str = RECIPE, overrides: tuple[str, ...] = ()) -> ComposedRecipe:
    """The recipe, composed; raises ConfigError as the command line does."""
    config = recipe_config(folder, text, overrides)
    check_layout(config, "pipeline", 1)
    return ComposedRecipe(config)
