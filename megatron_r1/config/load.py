"""From a verb and its overrides to a checked RunConfig: Hydra composes the YAML groups, `convert` checks the result.

Every error in a configuration is a ConfigError of one line, raised in well under a second and without torch. Only
Hydra's compose interface is used: no output folder, no changed working directory, no logging.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron_r1.config.recipes import configs_folder, groups, recipes
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import convert, defaults, kinds_of, name_fields, resolved, shown, unknown_key
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole

__all__ = ["difference", "load", "read_yaml", "resolved", "write_yaml"]

ABSENT = "(absent)"


def load(verb: str, overrides: Sequence[str] = (), config_name: str | None = None) -> RunConfig:
    """The configuration of one command.

    Args:
        verb: a key of VERBS; chooses the recipe where `config_name` does not.
        overrides: Hydra overrides, `key=value` or `group=option`.
        config_name: recipe in configs/, with or without `.yaml`.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    if verb not in VERBS:
        raise ConfigError("verb", verb, f"must be one of {', '.join(VERBS)}")
    recipe = (config_name or VERBS[verb].recipe).removesuffix(".yaml")
    if recipe not in recipes():
        raise ConfigError("--config-name", recipe, f"must be one of {', '.join(recipes())}")
    lines = [line for written in overrides for line in _spelt_out(written)]
    config = convert(RunConfig, _compose(recipe, [_checked(line) for line in lines]))
    check_sections(config, verb)
    return config


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
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {_spelt(before, key)} -> {_spelt(after, key)}"
        for key in before | after
        if _spelt(before, key) != _spelt(after, key)
    ]


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}": value}
    return flat


def _spelt(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else ABSENT


def _spelt_out(line: str) -> list[str]:
    """Expands `reward=FILE.py:NAME`, which is short for the preset `custom` with that function."""
    key, _, value = line.partition("=")
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
    try:
        override = OverridesParser.create().parse_override(line)
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


def _group_choice(group: str, override: Override) -> str:
    option, options = override.value(), groups()[group]
    if option not in options:
        raise ConfigError(group, shown(option), f"must be one of {', '.join(options)}")
    return f"{group}={option}"


def _compose(recipe: str, overrides: list[str]) -> object:
    """The plain nested dict of a recipe under overrides, interpolations resolved."""
    ConfigStore.instance().store(name="schema", node=defaults(RunConfig))
    try:
        with initialize_config_dir(config_dir=str(configs_folder()), version_base="1.3"):
            composed = compose(recipe, overrides)
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or recipe).rpartition("/")
        raise ConfigError(group or "--config-name", option, f"no such file; {shown(error)}") from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _blamed(recipe, overrides, shown(error)) from None
    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "config"
        reason = (
            "must be given a value" if isinstance(error, MissingMandatoryValue) else str(error).split("full_key")[0]
        )
        raise ConfigError(key, _raw(composed, key), shown(reason)) from None


def _blamed(recipe: str, overrides: list[str], reason: str) -> ConfigError:
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
