"""The YAML files of recipes and groups, each parsed once as long as it does not change."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

# libyaml gives the same trees and texts as Python's parser, in a fifth of the time; texts but for characters beyond 16
# bits, which it escapes.
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
SCALARS = (str, int, float, bool, type(None))


class NeedsHydra(Exception):
    """Hydra must compose: something is written that plain dicts do not cover, or that is wrong, which Hydra says."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One YAML file; who reads it does not change it."""

    package: str | None
    """What its comment `# @package NAME` names; None without one."""
    defaults: tuple[Any, ...]
    """Its defaults list; `_self_` alone where it has none."""
    values: dict[str, Any]
    """Its keys."""


class _Loader(SafeLoader):  # type: ignore[misc]
    """Reads scalars as OmegaConf does: `1e-3` is a number, a day is text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise NeedsHydra(f"a key stands twice in {keys}")
        return super().construct_mapping(node, deep=deep)


_FLOAT = re.compile(
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """What a text says, with scalars as OmegaConf reads them.

    Raises:
        NeedsHydra: a key stands twice.
        yaml.YAMLError: it is no YAML.
    """
    return _parse(_Loader(text))


def read_safely(text: str) -> Any:
    """As `yaml.safe_load`."""
    try:
        return _parse(SafeLoader(text))
    except yaml.YAMLError:
        return yaml.safe_load(text)  # whose error shows the text


def _parse(loader: Any) -> Any:
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def config_file(path: Path) -> ConfigFile:
    """A YAML file of the configuration.

    Raises:
        NeedsHydra: it is missing, is no YAML, or has an interpolation, a missing value or a key that is no text.
    """
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise NeedsHydra(str(error)) from None


@lru_cache(maxsize=1024)
def _parsed(path: Path, _: int) -> ConfigFile:
    """Kept until the file is written again."""
    text = path.read_text(encoding="utf-8")
    tree = parse_yaml(text) or {}
    if not (isinstance(tree, dict) and is_plain(tree)):
        raise NeedsHydra(str(path))
    defaults = tree.pop("defaults", ["_self_"])
    if not isinstance(defaults, list):
        raise NeedsHydra(str(path))
    return ConfigFile(_package(text), tuple(defaults), tree)


def _package(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    header = [line.lstrip("#").split() for line in takewhile(re.compile(r"#\s*@").match, lines)]
    if any(len(words) != 2 or words[0] != "@package" for words in header[:1]) or len(header) > 1:
        raise NeedsHydra(f"header {header}")
    return header[0][1] if header else None


def is_plain(value: Any) -> bool:
    """Whether a value means itself: no interpolation, no missing value, names that are text."""
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return type(value) in SCALARS and not (isinstance(value, str) and ("${" in value or value == "???"))
