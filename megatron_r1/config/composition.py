"""Composes a recipe, the options of its groups and overrides in plain dicts, as Hydra does.

What is written in another way than the forms here raises NeedsHydra, and so does what is wrong: `hydra_composition`
composes then. Hydra's machinery is general and takes a quarter of a second; this takes some milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megatron_r1.config.overrides import Override
from megatron_r1.config.recipes import configs_folder
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import defaults
from megatron_r1.config.yaml_files import ConfigFile, NeedsHydra, config_file, is_plain

GLOBAL = "_global_"
SCHEMA = "schema"
"""Entry of a defaults list: every key with its default."""
SELF = "_self_"
"""Entry of a defaults list: the keys of the file itself."""


def compose_plainly(recipe: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """A recipe under overrides, whose dicts and lists must not be changed: files share them.

    Raises:
        NeedsHydra: something is written in a form that is not covered here, or is wrong.
    """
    choices = {override.key: override.value for override in overrides if override.kind == "group"}
    tree = _RecipeFiles(recipe, choices).composed()
    for override in overrides:
        if override.kind == "deletion" or not is_plain(override.value):
            raise NeedsHydra(override.line)
        if override.kind == "value":
            tree = _with_value(tree, override.key.split("."), override.value)
    return tree


@dataclass
class _RecipeFiles:
    """One composition of the files that a recipe names."""

    name: str
    """Of the recipe's file."""
    choices: Mapping[str, str]
    """Group -> option that the command line chooses."""
    read: set[str] = field(default_factory=set)
    """Files met so far; Hydra refuses one that is met twice."""

    def composed(self) -> dict[str, Any]:
        """The files merged in the order of their defaults lists."""
        tree: dict[str, Any] = {}
        replaced = {**self._replaced(self.name), **self.choices}
        offered: set[str] = set()
        for package, values in self._sources(self.name, replaced, offered):
            tree = _merged(tree, {package: values} if package else values)
        if unknown := replaced.keys() - offered:
            raise NeedsHydra(f"no defaults list has {unknown}")
        return tree

    def _replaced(self, name: str) -> dict[str, Any]:
        """Group -> option by the entries `override GROUP: OPTION` of a recipe and of those that it inherits."""
        entries = config_file(configs_folder() / f"{name}.yaml").defaults
        inherited = [self._replaced(entry) for entry in entries if _is_inherited(entry)]
        own = [dict([_only_item(entry)]) for entry in entries if _is_replacing(entry)]
        return {
            group.removeprefix("override "): option
            for options in (*inherited, *own)
            for group, option in options.items()
        }

    def _sources(
        self, name: str, replaced: Mapping[str, Any], offered: set[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Section, or nothing for the whole, and its values, in the order in which they are merged."""
        file = self._read(name)
        for entry in file.defaults:
            if entry == SELF:
                yield "", file.values
            elif entry == SCHEMA:
                yield "", _schema()
            elif isinstance(entry, str):
                yield from self._sources(entry, replaced, offered)
            elif not _is_replacing(entry):
                group, option = _only_item(entry)
                if not group.isidentifier() or group in offered:
                    raise NeedsHydra(group)
                offered.add(group)
                if (chosen := replaced.get(group, option)) is not None:
                    yield from self._option(group, chosen)

    def _option(self, group: str, option: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """As `_sources`, of an option and of the options of its group that it starts from."""
        if not isinstance(option, str):
            raise NeedsHydra(f"{group}={option}")
        file = self._read(f"{group}/{option}")
        package = "" if file.package == GLOBAL else group
        for entry in file.defaults:
            if entry == SELF:
                yield package, file.values
            else:
                for inner, values in self._option(group, entry):
                    if inner != package:  # which Hydra nests
                        raise NeedsHydra(f"{group}/{entry}")
                    yield inner, values

    def _read(self, name: str) -> ConfigFile:
        file = config_file(configs_folder() / f"{name}.yaml")
        if name in self.read or file.package not in (None, GLOBAL) or not _is_ordered(file.defaults):
            raise NeedsHydra(name)
        self.read.add(name)
        return file


def _is_ordered(entries: Iterable[Any]) -> bool:
    """Whether `_self_` is the last entry, and the options that are replaced stand just before it."""
    *others, last = [*entries] or [None]
    kinds = [_is_replacing(entry) for entry in others]
    return last == SELF and SELF not in others and kinds == sorted(kinds)


def _is_inherited(entry: Any) -> bool:
    return isinstance(entry, str) and entry not in (SELF, SCHEMA)


def _is_replacing(entry: Any) -> bool:
    return isinstance(entry, dict) and _only_item(entry)[0].startswith("override ")


def _only_item(entry: Any) -> tuple[str, Any]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise NeedsHydra(f"defaults {entry}")
    return next(iter(entry.items()))


@cache
def _schema() -> dict[str, Any]:
    return defaults(RunConfig)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both dicts' keys; where both have one, sections are merged and the new value replaces another."""
    return {**old, **{key: _replacement(old.get(key), value) for key, value in new.items()}}


def _replacement(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return _merged(old, new)
    if isinstance(old, dict | list) and isinstance(new, dict | list) and type(old) is not type(new):
        raise NeedsHydra(f"{new} for {old}")
    return new


def _with_value(tree: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A tree with the value at these keys; what is no section on the way becomes one."""
    key, *rest = keys
    old = tree.get(key)
    if not rest:
        return {**tree, key: _replacement(old, value)}
    if isinstance(old, list):
        raise NeedsHydra(f"{key} is a list")
    return {**tree, key: _with_value(old if isinstance(old, dict) else {}, rest, value)}
