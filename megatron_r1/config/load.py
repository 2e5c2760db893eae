"""From a verb and its overrides to a checked RunConfig: the YAML groups are composed, `convert` checks the result.

Every error in a configuration is a ConfigError of one line, raised in well under a second and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.config.composition import compose_plainly
from megatron_r1.config.cross_checks import check_sections
from megatron_r1.config.initial_model import (
    MAY_DIFFER,
    check_same_model,
    model_of_weights,
    without_unused_layers,
)
from megatron_r1.config.keys import keys_of_recipe, overridden, reads
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.overrides import Override, parse_overrides
from megatron_r1.config.recipes import recipes
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import convert, resolved, shown
from megatron_r1.config.verbs import VERBS
from megatron_r1.config.yaml_files import NeedsHydra, SafeDumper, read_safely
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole

__all__ = ["difference", "flat", "load", "load_all", "read_yaml", "resolved", "write_yaml"]

ABSENT = "(absent)"


FindModel = Callable[[str], ModelConfig | None]
"""Reads the model of the weights that `init.from` names; None where it is unknown, and the recipe's counts."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked configuration."""

    config: RunConfig
    """The configuration."""
    origins: dict[str, str]
    """Key of `model` -> where its value is from, where initial weights name the model."""


def load(verb: str, overrides: Sequence[str] = (), config_name: str | None = None) -> RunConfig:
    """The configuration of one command; initial weights are not looked at. Arguments and errors as of `load_all`."""
    return load_all(verb, overrides, config_name, None).config


def load_all(
    verb: str, overrides: Sequence[str], config_name: str | None, find_model: FindModel | None
) -> LoadedConfig:
    """The configuration of one command, with the model of the weights that it starts from.

    Args:
        verb: a key of VERBS; chooses the recipe where `config_name` does not.
        overrides: Hydra overrides, `key=value` or `group=option`.
        config_name: recipe in configs/, with or without `.yaml`.
        find_model: reads the model that `init.from` names: it replaces the recipe's, and keys of `model` that recipe
            or overrides set must be those that may differ. With `model=NAME` among the overrides the two must agree.

    Raises:
        ConfigError: names the key, its value and what is allowed.
        UserError: as `find_model`.
    """
    loaded = load_sections(verb, overrides, config_name, find_model)
    check_sections(loaded.config, verb)
    return loaded


def load_sections(
    verb: str, overrides: Sequence[str], config_name: str | None, find_model: FindModel | None
) -> LoadedConfig:
    """As `load_all`, but each section is checked alone, and no values of several sections together."""
    if verb not in VERBS:
        raise ConfigError("verb", verb, f"must be one of {', '.join(VERBS)}")
    recipe = (config_name or VERBS[verb].recipe).removesuffix(".yaml")
    if recipe not in recipes():
        raise ConfigError("--config-name", recipe, f"must be one of {', '.join(recipes())}")
    changes = [override for line in overrides for override in parse_overrides(verb, line)]
    tree = _compose(recipe, changes)
    origins: dict[str, str] = {}
    source = tree["init"].get("from")
    found = find_model(source) if find_model and reads(verb, "init.from") and source else None
    if found and not any(change.kind == "group" and change.key == "model" for change in changes):
        may_differ = () if verb == "convert" else MAY_DIFFER  # which changes the format of weights and nothing else
        overrides_of_model = _model_overrides(recipe, changes)
        tree["model"], origins = model_of_weights(tree["model"], found, overrides_of_model, source, may_differ)
    config = convert(RunConfig, tree)
    if found:
        check_same_model(config.model, without_unused_layers(found, config.model), source)
    return LoadedConfig(config, origins)


def _model_overrides(recipe: str, changes: Sequence[Override]) -> dict[str, str]:
    """Key within `model` -> who sets it, the recipe's own file or the command line."""
    keys = {key: f"recipe {recipe}" for key, _ in keys_of_recipe(recipe)}
    keys |= {key: "command line" for change in changes for key, _ in overridden(change.line)}
    within = {key.removeprefix("model."): origin for key, origin in keys.items() if key.startswith("model.")}
    return {key: origin for key, origin in within.items() if not any(other.startswith(f"{key}.") for other in within)}


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; a reader sees the old file or the whole new one."""
    write_whole(path, as_yaml(config).encode())


def as_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text."""
    text: str = yaml.dump(resolved(config), Dumper=SafeDumper, sort_keys=False, allow_unicode=True)
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain dict that `write_yaml` wrote.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    try:
        tree = read_safely(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("config file", path, shown(error)) from None
    if not isinstance(tree, dict):
        raise ConfigError("config file", path, "must be a YAML mapping")
    return tree


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences of two resolved configurations, one `key: old -> new` for each key."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {_spelt(before, key)} -> {_spelt(after, key)}"
        for key in before | after
        if _spelt(before, key) != _spelt(after, key)
    ]


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted key -> value, of a resolved configuration; an empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}": value}
    return found


def _spelt(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else ABSENT


def _compose(recipe: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """The plain nested dict of a recipe under overrides, interpolations resolved."""
    try:
        return compose_plainly(recipe, overrides)
    except NeedsHydra:
        from megatron_r1.config.hydra_composition import compose_by_hydra  # a quarter of a second

        return compose_by_hydra(recipe, overrides)
