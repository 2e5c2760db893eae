"""From a verb and its overrides to a checked RunConfig: Hydra composes the YAML groups, `convert` checks the result.

Every error in a configuration is a ConfigError of one line, raised in well under a second and without torch. Only
Hydra's compose interface is used: no output folder, no changed working directory, no logging.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_r1.config.cross_checks import check_sections
from megatron_r1.config.initial_model import (
    MAY_DIFFER,
    check_same_model,
    model_of_weights,
    without_unused_layers,
)
from megatron_r1.config.keys import keys_of_recipe, overridden, reads
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.recipes import configs_folder, groups, recipes
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import convert, defaults, kinds_of, name_fields, resolved, shown, unknown_key
from megatron_r1.config.verbs import VERBS
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
    lines = [_checked(line) for written in overrides for line in _spelt_out(verb, written)]
    tree = _compose(recipe, lines)
    origins: dict[str, str] = {}
    source = tree["init"].get("from")
    found = find_model(source) if find_model and reads(verb, "init.from") and source else None
    if found and not any(line.startswith("model=") for line in lines):
        may_differ = () if verb == "convert" else MAY_DIFFER  # which changes the format of weights and nothing else
        overrides_of_model = _model_overrides(recipe, lines)
        tree["model"], origins = model_of_weights(tree["model"], found, overrides_of_model, source, may_differ)
    config = convert(RunConfig, tree)
    if found:
        check_same_model(config.model, without_unused_layers(found, config.model), source)
    return LoadedConfig(config, origins)


def _model_overrides(recipe: str, lines: Sequence[str]) -> dict[str, str]:
    """Key within `model` -> who sets it, the recipe's own file or the command line."""
    keys = {key: f"recipe {recipe}" for key, _ in keys_of_recipe(recipe)}
    keys |= {key: "command line" for line in lines for key, _ in overridden(line)}
    within = {key.removeprefix("model."): origin for key, origin in keys.items() if key.startswith("model.")}
    return {key: origin for key, origin in within.items() if not any(other.startswith(f"{key}.") for other in within)}


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; a reader sees the old file or the whole new one."""
    write_whole(path, as_yaml(config).encode())


def as_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text."""
    text: str = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain dict that `write_yaml` wrote.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
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


def _spelt_out(verb: str, line: str) -> list[str]:
    """Expands the verb's short forms, and `reward=FILE.py:NAME`: the preset `custom` with that function."""
    key, _, value = line.partition("=")
    if spelt := dict(VERBS[verb].short_forms).get(key):
        return [f"{spelt}={value}"]
    if key.lstrip("+") == "reward" and ".py:" in value:
        return ["reward=custom", f"reward.custom_function={value}"]
    return [line]


def _checked(line: str) -> str:
    """One override in the form that Hydra gets.

    Every `key=value` is passed as `++key=value`, so that Hydra accepts any key: `convert` refuses unknown keys, with
    clearer errors, and treats `+key`, `++key` and `key` alike.
    """
    written, _, value = line.partition("=")
    name = shown(written.lstrip("+~"))
    if line == written and not line.startswith("~"):
        raise ConfigError(name, "", "must be key=value")
    try:
        override = _parsed(line)
        several = override.is_sweep_override()
    except (HydraException, ValueError) as error:
        detail = shown(error.__cause__ or error) if isinstance(error, OverrideParseException) else shown(error)
        raise ConfigError(name, shown(value), f"must be key=value, odd characters in quotes ({detail})") from None
    key = override.key_or_group
    section = key.split(".")[0]
    if "/" in key or override.package is not None or section not in kinds_of(RunConfig):
        raise unknown_key(name, value)
    if override.is_delete():
        if not any(key.startswith(f"{parent}.") for parent in name_fields()):
            raise ConfigError(key, shown(value), "cannot be deleted; give it a value")
        return line
    if several:
        raise ConfigError(key, shown(value), "must be one value; several are a list: [a,b]")
    if key in groups():
        return _group_choice(key, override)
    return f"++{line.lstrip('+')}"


@lru_cache(maxsize=4096)
def _parsed(line: str) -> Override:
    """Parsed by Hydra's grammar, which takes milliseconds; the stages of a recipe share most of their overrides."""
    return OverridesParser.create().parse_override(line)


def _group_choice(group: str, override: Override) -> str:
    option, options = override.value(), groups()[group]
    if option not in options:
        raise ConfigError(group, shown(option), f"must be one of {', '.join(options)}")
    return f"{group}={option}"


def _compose(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The plain nested dict of a recipe under overrides, interpolations resolved."""
    changes_values = [line.startswith("++") for line in overrides]
    deletes = any(line.startswith("~") for line in overrides)  # which must happen between the others
    by_hydra = [line for line, later in zip(overrides, changes_values, strict=True) if deletes or not later]
    composed = OmegaConf.create(_composed_by_hydra(recipe, tuple(by_hydra), _stamps()))
    for line, later in zip(overrides, changes_values, strict=True):
        if later and not deletes:
            _update(composed, line)
    try:
        return dict(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        key = error.full_key or "config"
        reason = (
            "must be given a value" if isinstance(error, MissingMandatoryValue) else str(error).split("full_key")[0]
        )
        raise ConfigError(key, _raw(composed, key), shown(reason)) from None


@lru_cache(maxsize=256)
def _composed_by_hydra(recipe: str, overrides: tuple[str, ...], _: tuple[object, ...]) -> dict[str, Any]:
    """A recipe under chosen groups, with interpolations as they are written.

    Kept until a YAML file changes: Hydra takes a tenth of a second, and the stages of a recipe choose the same groups.
    """
    ConfigStore.instance().store(name="schema", node=defaults(RunConfig))
    try:
        with initialize_config_dir(config_dir=str(configs_folder()), version_base="1.3"):
            return dict(OmegaConf.to_container(compose(recipe, list(overrides))))  # type: ignore[arg-type]
    except MissingConfigException as error:
        group, option = (error.missing_cfg_file or recipe).rpartition("/")[::2]
        raise ConfigError(group or "--config-name", option, f"no such file; {shown(error)}") from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _blamed(recipe, overrides, shown(error)) from None


def _stamps() -> tuple[object, ...]:
    """When each YAML file was last changed."""
    return tuple((str(path), path.stat().st_mtime_ns) for path in configs_folder().rglob("*.yaml"))


def _update(composed: Any, line: str) -> None:
    """Change a composed configuration by an override `++key=value`, as Hydra does."""
    override = _parsed(line)
    try:
        OmegaConf.update(composed, override.key_or_group, override.value(), merge=True, force_add=True)
    except OmegaConfBaseException as error:
        key, _, value = line.lstrip("+").partition("=")
        raise ConfigError(key, shown(value), f"cannot be composed: {shown(error)}") from None


def _blamed(recipe: str, overrides: Sequence[str], reason: str) -> ConfigError:
    """Hydra's error under the key of the override that caused it, else under the recipe's name."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if override in reason or f"'{key}'" in reason:
            return ConfigError(key, shown(value), f"cannot be composed: {reason}")
    return ConfigError("--config-name", recipe, f"cannot be composed: {reason}")


def _raw(composed: Any, key: str) -> str:
    """The value of a key before interpolation, as it was written."""
    node: Any = OmegaConf.to_container(composed, resolve=False)
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return shown(node)
