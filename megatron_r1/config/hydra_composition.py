"""Hydra composes what `composition` does not cover, and says what is wrong.

Only its compose interface is used: no output folder, no changed working directory, no logging.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_r1.config.overrides import Override
from megatron_r1.config.recipes import configs_folder
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import defaults, shown
from megatron_r1.errors import ConfigError


def compose_by_hydra(recipe: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """The plain nested dict of a recipe under overrides, interpolations resolved.

    Raises:
        ConfigError: names the override, the key or the recipe that cannot be composed.
    """
    deletes = any(override.kind == "deletion" for override in overrides)  # which must happen between the others
    by_hydra = [override.line for override in overrides if deletes or override.kind != "value"]
    composed = OmegaConf.create(_composed(recipe, tuple(by_hydra), _stamps()))
    for override in overrides:
        if override.kind == "value" and not deletes:
            _update(composed, override)
    try:
        return dict(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        key = error.full_key or "config"
        reason = (
            "must be given a value" if isinstance(error, MissingMandatoryValue) else str(error).split("full_key")[0]
        )
        raise ConfigError(key, _raw(composed, key), shown(reason)) from None


@lru_cache(maxsize=256)
def _composed(recipe: str, overrides: tuple[str, ...], _: tuple[object, ...]) -> dict[str, Any]:
    """A recipe under chosen groups, with interpolations as they are written; kept until a YAML file changes."""
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


def _update(composed: Any, override: Override) -> None:
    """Change a composed configuration by a value, as Hydra does."""
    try:
        OmegaConf.update(composed, override.key, override.value, merge=True, force_add=True)
    except OmegaConfBaseException as error:
        key, _, value = override.line.lstrip("+").partition("=")
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
