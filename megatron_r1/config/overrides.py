"""Overrides of a command line, each parsed: key=value, GROUP=OPTION, ~key.

The everyday forms of Hydra's grammar are parsed here; Hydra, whose import takes a quarter of a second, parses all
others and names what is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_r1.config.recipes import groups
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import kinds_of, name_fields, shown, unknown_key
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError

EVERYDAY = re.compile(r"(\+{0,2})((?:[A-Za-z_][A-Za-z0-9_]*)(?:\.[A-Za-z_][A-Za-z0-9_]*)*)=(.*)")
TEXT = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./:-]*")
QUOTED = re.compile(r"'([^'\\]*)'|\"([^\"\\]*)\"")
WHOLE_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
WORDS = {"true": True, "false": False, "null": None, "inf": float("inf"), "nan": float("nan")}


@dataclass(frozen=True, slots=True)
class Override:
    """One override, parsed and known to fit the keys."""

    line: str
    """In the form that Hydra takes: `++key=value`, so that it accepts any key; `GROUP=OPTION`; `~key`."""
    key: str
    """Dotted key, or the group."""
    value: Any
    """Plain value: text, number, truth value, None, or a list or dict of them; of a group, its option."""
    kind: Literal["value", "group", "deletion"]
    """What it changes."""


def parse_overrides(verb: str, line: str) -> list[Override]:
    """What one argument overrides, short forms spelt out.

    `convert` refuses unknown keys, with clearer errors than Hydra's, and treats `+key`, `++key` and `key` alike.

    Raises:
        ConfigError: it is no override, or its key, group or option does not exist.
    """
    return [_checked(written) for written in _spelt_out(verb, line)]


def _spelt_out(verb: str, line: str) -> list[str]:
    """Expands the verb's short forms, and `reward=FILE.py:NAME`: the preset `custom` with that function."""
    key, _, value = line.partition("=")
    if spelt := dict(VERBS[verb].short_forms).get(key):
        return [f"{spelt}={value}"]
    if key.lstrip("+") == "reward" and ".py:" in value:
        return ["reward=custom", f"reward.custom_function={value}"]
    return [line]


def _checked(line: str) -> Override:
    written, _, text = line.partition("=")
    name = shown(written.lstrip("+~"))
    if line == written and not line.startswith("~"):
        raise ConfigError(name, "", "must be key=value")
    key, value, deletes = _everyday(line) or _by_hydra(line, name, text)
    if key.split(".")[0] not in kinds_of(RunConfig):
        raise unknown_key(name, text)
    if deletes:
        if not any(key.startswith(f"{parent}.") for parent in name_fields()):
            raise ConfigError(key, shown(text), "cannot be deleted; give it a value")
        return Override(line, key, value, "deletion")
    if "." not in key and (options := groups().get(key)):
        if value not in options:
            raise ConfigError(key, shown(value), f"must be one of {', '.join(options)}")
        return Override(f"{key}={value}", key, value, "group")
    return Override(f"++{line.lstrip('+')}", key, value, "value")


@lru_cache(maxsize=4096)
def _everyday(line: str) -> tuple[str, Any, bool] | None:
    """Key, value and that it deletes nothing; None for a form that Hydra must parse."""
    if not (found := EVERYDAY.fullmatch(line)):
        return None
    try:
        return found[2], plain_value(found[3]), False
    except ValueError:
        return None


def plain_value(text: str) -> Any:
    """The value of an everyday form: text, quoted text, a number, a truth value, or a list of them.

    Raises:
        ValueError: another form.
    """
    if not text:
        return ""
    if text.startswith("[") and text.endswith("]"):
        return [_item(item) for item in text[1:-1].split(",")] if text != "[]" else []
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if TEXT.fullmatch(text):
        return text
    if quoted := QUOTED.fullmatch(text):
        return quoted[1] if quoted[2] is None else quoted[2]
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text):
        return float(text)
    raise ValueError(text)


def _item(text: str) -> Any:
    if not text:
        raise ValueError("an item is empty")
    return plain_value(text)


def _by_hydra(line: str, name: str, text: str) -> tuple[str, Any, bool]:
    """Key, value and whether the key is deleted, as Hydra parses them."""
    from megatron_r1.config.hydra_overrides import parsed

    override = parsed(line, name, text)
    key = override.key_or_group
    if "/" in key or override.package is not None or key.split(".")[0] not in kinds_of(RunConfig):
        raise unknown_key(name, text)
    if not override.is_delete() and override.is_sweep_override():
        raise ConfigError(key, shown(text), "must be one value; several are a list: [a,b]")
    return key, override.value(), override.is_delete()
