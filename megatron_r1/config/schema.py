"""Plain nested dicts to configuration dataclasses and back.

`convert` drops nothing and guesses nothing. An unknown key, a null, a value of another type and a value that a
section's own check refuses each raise one ConfigError with the full dotted key.

A key is its field's name without a trailing underscore: the field `from_` is the key `from`. Where several sections are
possible, their common key `kind` chooses one; the default of that field is the section's own kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_r1.config.hints import hinted
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError

KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
LONGEST_VALUE = 80


def key_of(field: Field[Any]) -> str:
    """The key that a field has in YAML and on the command line."""
    return field.name.removesuffix("_")


def convert[T](section: type[T], tree: object, path: str = "") -> T:
    """The dataclass `section` from a plain dict; missing keys take their defaults.

    Args:
        section: a configuration dataclass, e.g. RunConfig.
        tree: nested dicts, lists, strings and numbers as YAML gives them.
        path: dotted key of the section, put in front of every key in an error.

    Raises:
        ConfigError: the first key that is unknown or whose value is not allowed.
    """
    if not isinstance(tree, dict):
        raise ConfigError(path, shown(tree), f"must be a section with the keys {', '.join(kinds_of(section))}")
    kinds = kinds_of(section)
    for key, value in tree.items():
        if key not in kinds:
            raise unknown_key(joined(path, key), value)
    values = {
        field.name: _value(kinds[key_of(field)], tree[key_of(field)], joined(path, key_of(field)))
        for field in fields(section)  # type: ignore[arg-type]
        if key_of(field) in tree
    }
    try:
        return section(**values)
    except ConfigError as error:
        raise ConfigError(error.key, shown(error.value), error.allowed).under(path) from None


def resolved(config: Any) -> dict[str, Any]:
    """A configuration as the plain nested dict that `convert` takes."""
    return {key_of(field): _plain(getattr(config, field.name)) for field in fields(config)}


def defaults(section: Any) -> dict[str, Any]:
    """Every key of a section with its default, as a plain nested dict.

    Where several sections are possible, the dict is empty: keys of the default section must not mix with another's.
    """
    tree: dict[str, Any] = {}
    for field in fields(section):
        kind = kinds_of(section)[key_of(field)]
        if sections_of(kind)[1:]:
            tree[key_of(field)] = {}
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory
        tree[key_of(field)] = defaults(kind) if is_dataclass(kind) else default() if callable(default) else default
    return tree


def kinds_of(section: Any) -> dict[str, Any]:
    """Key -> declared type, in the order of declaration."""
    return _kinds_of(section)


@cache
def _kinds_of(section: Any) -> dict[str, Any]:
    hints = get_type_hints(section)
    return {key_of(field): hints[field.name] for field in fields(section)}


def unknown_key(key: str, value: object) -> ConfigError:
    """The error for a key that does not exist, with the key that was most likely meant."""
    parent, _, name = key.rpartition(".")
    siblings = {joined(parent, sibling): sibling for sibling in _children(parent)}
    anywhere = list(_all_keys(RunConfig))
    near = (
        [known for known in (hinted(key),) if known and known != key]
        or [joined(parent, match) for match in get_close_matches(name, siblings.values(), n=1)]
        or [known for known in anywhere if known.rpartition(".")[2] == name][:1]
        or get_close_matches(key, anywhere, n=1, cutoff=0.7)
    )
    hint = f"did you mean {near[0]}?" if near else f"the keys there are {', '.join(siblings or kinds_of(RunConfig))}"
    return ConfigError(key, shown(value), f"no such key; {hint}")


def exists(path: str) -> bool:
    """Whether a dotted key is one, of a section or of a value."""
    parent, _, name = path.rpartition(".")
    return name in _children(parent) or get_origin(_kind_at(parent)) is dict


def name_fields(section: Any = RunConfig, path: str = "") -> Iterator[str]:
    """Dotted keys of the fields below which any name may be written: name -> value."""
    for key, kind in kinds_of(section).items():
        if is_dataclass(kind):
            yield from name_fields(kind, joined(path, key))
        elif get_origin(kind) is dict:
            yield joined(path, key)


def joined(path: str, key: object) -> str:
    """A dotted key."""
    return f"{path}.{key}" if path else str(key)


def shown(value: object) -> str:
    """A value on one line as YAML spells it, cut when it is long."""
    spelt = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
    text = " ".join(str(spelt).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def sections_of(kind: Any) -> tuple[Any, ...]:
    """The sections that a declared type allows; none where it is no section."""
    if isinstance(kind, UnionType):
        return get_args(kind)
    return (kind,) if is_dataclass(kind) else ()


def _chosen(sections: tuple[Any, ...], value: object, key: str) -> Any:
    """The one of several sections that `kind` names; the first where it is left out."""
    if len(sections) == 1 or not isinstance(value, dict):
        return sections[0]
    named = {section.__dataclass_fields__["kind"].default: section for section in sections}
    kind = value.get("kind", next(iter(named)))
    if not isinstance(kind, str) or kind not in named:
        raise ConfigError(joined(key, "kind"), shown(kind), f"must be one of {', '.join(named)}")
    return named[kind]


def _value(kind: Any, value: object, key: str) -> Any:
    if sections := sections_of(kind):
        return convert(_chosen(sections, value, key), value, key)
    if get_origin(kind) is dict:
        return _names(get_args(kind)[1], value, key)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(key, shown(value), "must be a list: [a,b]")
        return [_value(get_args(kind)[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    return _scalar(kind, value, key)


def _names(kind: Any, value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(key, shown(value), "must be names with values: {name: value}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"{key}.{shown(name)}", shown(value[name]), "a name must be text")
    return {name: _value(kind, item, joined(key, name)) for name, item in value.items()}


def _scalar(kind: type, value: object, key: str) -> bool | int | float | str:
    """The value as `kind`: a whole float is accepted as int, an int as float; no other type is converted."""
    if type(value) is kind and not (isinstance(value, float) and not math.isfinite(value)):
        return value  # type: ignore[return-value]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    hint = f" (in quotes: '{shown(value)}')" if kind is str and not isinstance(value, dict | list | None) else ""
    raise ConfigError(key, shown(value), f"must be {KINDS[kind]}{hint}")


def _plain(value: object) -> Any:
    if is_dataclass(value):
        return resolved(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _kind_at(path: str) -> Any:
    """The declared type of a dotted key; None where there is none."""
    kind: Any = RunConfig
    for key in filter(None, path.split(".")):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = next((kinds_of(part)[key] for part in sections_of(kind) if key in kinds_of(part)), None)
    return kind


def _children(path: str) -> Sequence[str]:
    """Keys of the section at a dotted path; none where there is no section."""
    return tuple({key: None for section in sections_of(_kind_at(path)) for key in kinds_of(section)})


def _all_keys(section: Any, path: str = "") -> Iterator[str]:
    for key, kind in kinds_of(section).items():
        yield joined(path, key)
        for part in sections_of(kind):
            yield from _all_keys(part, joined(path, key))
