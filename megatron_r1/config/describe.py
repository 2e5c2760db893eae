"""Describes every key: for `--help KEY`, for the comments of `--cfg job`, and for configs/README.md.

Meaning, type, default and limits are read from the classes' source: the docstring under a field, its annotation, its
default and the checks of `__post_init__`. `python -m megatron_r1.config.describe` prints configs/README.md.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from itertools import pairwise
from typing import Any, get_args, get_origin

import yaml

from megatron_r1.config.keys import reads
from megatron_r1.config.recipes import groups
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import defaults, joined, key_of, kinds_of, resolved, sections_of, unknown_key
from megatron_r1.config.verbs import VERBS

TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
UNITS = {
    "s": "seconds", "minutes": "minutes", "mb": "MB", "mib": "MiB", "kib": "KiB", "gb": "GB",
    "tokens": "tokens", "steps": "steps", "rollouts": "rollouts", "characters": "characters",
}  # fmt: skip
"""Last word of a key -> unit."""
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Key:
    """One key and its description."""

    path: str
    """Dotted key."""
    meaning: str
    """The docstring under its field."""
    kind: str
    """Type, in words."""
    default: str
    """Default, as YAML spells it."""
    allowed: str
    """Values that the checks of its section allow."""
    section: bool
    """Whether it is a section."""

    @property
    def unit(self) -> str:
        """Unit of a number, where the key's name says it."""
        return UNITS.get(self.path.rpartition("_")[2], "") if self.kind in ("whole number", "number") else ""

    def facts(self) -> str:
        """Type, unit, default and allowed values on one line."""
        unit = f" of {self.unit}" if self.unit else ""
        parts = [f"{self.kind}{unit}", f"default {self.default}", self.allowed]
        return "; ".join(part for part in parts if part)


def all_keys(section: Any = RunConfig, path: str = "") -> Iterator[Key]:
    """Every key, a section before its own keys."""
    texts, limits, values = docstrings(section), _limits(section), _defaults(section)
    for field, (key, kind) in zip(section.__dataclass_fields__.values(), kinds_of(section).items(), strict=True):
        parts = sections_of(kind)
        value = "" if parts else _spelt(values[key])
        yield Key(joined(path, key), texts[field.name], _type(kind), value, limits.get(field.name, ""), bool(parts))
        for part in parts or _item_sections(kind):
            yield from all_keys(part, joined(path, key if parts else f"{key}.NAME" if _named(kind) else f"{key}[]"))


def help_of(topic: str, verb: str = "") -> str:
    """What a key or a section means.

    Raises:
        ConfigError: there is no such key.
    """
    found = [key for key in all_keys() if key.path == topic or key.path.startswith((f"{topic}.", f"{topic}["))]
    if not found:
        raise unknown_key(topic, "")
    readers = ", ".join(name for name in VERBS if reads(name, topic))
    lines = [] if found[0].path == topic else [topic, ""]
    for key in found:
        if verb and key.path != topic and not reads(verb, key.path):
            continue
        lines += [key.path if key.section else f"{key.path}  ({key.facts()})"]
        lines += textwrap.wrap(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    if topic in groups():
        lines += ["", *textwrap.wrap(f"options: {topic}={', '.join(groups()[topic])}", WIDTH, subsequent_indent="    ")]
    return "\n".join([*lines, "", f"read by: {readers or 'no verb'}"])


def sections_read_by(verb: str) -> list[tuple[str, str]]:
    """Section and its meaning, of those that a verb reads at least one key of."""
    top = (key for key in all_keys() if key.section and "." not in key.path)
    return [(key.path, key.meaning) for key in top if reads(verb, key.path)]


def commented_yaml(config: RunConfig, verb: str, origins: Mapping[str, str]) -> str:
    """The resolved configuration of one verb as YAML: only what it reads, each key under its meaning.

    Args:
        origins: key -> where its value is from; said beside the value.
    """
    lines = list(_commented(config, verb, "", 0, origins))
    folded = [key for key in kinds_of(RunConfig) if not reads(verb, key)]
    if folded:
        text = f"{verb} does not read: {', '.join(folded)}"
        lines += ["", *textwrap.wrap(text, 116, initial_indent="# ", subsequent_indent="# ")]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """configs/README.md."""
    lines = [
        "# Configuration reference",
        "",
        "Written by `python -m megatron_r1.config.describe > configs/README.md`; a test compares. On the command line:",
        "`megatron-r1 --help KEY`, `megatron-r1 VERB --help SECTION`, and `megatron-r1 VERB --cfg job` for all values.",
        "A verb refuses keys that it never reads. Recipes (`*.yaml`) inherit `_base.yaml`; folders hold options.",
        "",
        "## Every run",
        "",
        *_header(),
    ]
    for key in all_keys():
        if key.section and "." not in key.path:
            readers = ", ".join(f"`{verb}`" for verb in VERBS if reads(verb, key.path))
            lines += [
                "",
                f"## {key.path}",
                "",
                f"{_cell(key.meaning)} Read by {readers}.",
                *_options(key.path),
                "",
                *_header(),
            ]
        elif not key.section:
            values = (f"`{key.path}`", f"{key.kind}{f' ({key.unit})' if key.unit else ''}", _code(key.default))
            lines.append(f"| {' | '.join([*values, _cell(key.allowed), _cell(key.meaning)])} |")
    return "\n".join(lines) + "\n"


@cache
def docstrings(section: Any) -> dict[str, str]:
    """Field name -> the docstring under it, on one line."""
    body = _body(section)
    texts = {}
    for statement, after in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            texts[ast.unparse(statement.target)] = " ".join(str(after.value.value).split())
    return texts


def _body(section: Any) -> list[ast.stmt]:
    return _classes(section.__module__)[section.__name__].body


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module as they are written."""
    statements = ast.parse(getsource(sys.modules[module])).body
    return {statement.name: statement for statement in statements if isinstance(statement, ast.ClassDef)}


@cache
def _limits(section: Any) -> dict[str, str]:
    """Field name -> what its own checks allow, from the plain calls of `__post_init__`."""
    found: dict[str, str] = {}
    scope = vars(sys.modules[section.__module__])
    for method in _body(section):
        if not isinstance(method, ast.FunctionDef) or method.name != "__post_init__":
            continue
        for call in (node for node in ast.walk(method) if isinstance(node, ast.Call)):
            check, names = ast.unparse(call.func), [name for node in call.args if (name := _text_of(node))]
            if check == "one_of":
                choices = _choices(call.args[2], scope)
                found |= dict.fromkeys(names, ", ".join(choices))
            elif check == "at_least" and isinstance(call.args[1], ast.Constant):
                found |= dict.fromkeys(names, f"at least {ast.unparse(call.args[1])}")
            elif check == "within":
                low, high = (ast.unparse(node) for node in call.args[1:3])
                found |= dict.fromkeys(names, f"{low} to {high}")
    return found


def _choices(node: ast.expr, scope: dict[str, Any]) -> list[str]:
    """The texts that an expression lists: a tuple of constants and names, a name, or `tuple(NAME)`."""
    if isinstance(node, ast.Tuple):
        return [choice for part in node.elts for choice in _choices(part, scope)]
    if isinstance(node, ast.Call):
        return _choices(node.args[0], scope)
    if isinstance(node, ast.Name):
        return [scope[node.id]] if isinstance(scope[node.id], str) else list(scope[node.id])
    return [_text_of(node)]


def _text_of(node: ast.expr) -> str:
    """The text that an expression is; empty where it is none."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _defaults(section: Any) -> dict[str, Any]:
    return defaults(section)


def _named(kind: Any) -> bool:
    return get_origin(kind) is dict


def _item_sections(kind: Any) -> tuple[Any, ...]:
    """The sections that a list or a dictionary holds."""
    return sections_of(get_args(kind)[-1]) if get_origin(kind) in (list, dict) else ()


def _type(kind: Any) -> str:
    if sections_of(kind):
        return "section"
    if _item_sections(kind):
        return "names with sections" if _named(kind) else "list of sections"
    if get_origin(kind) in (list, dict):
        return f"{'names with' if _named(kind) else 'list of'} {TYPES[get_args(kind)[-1]]}"
    return TYPES[kind]


def _spelt(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    return text


def _commented(section: Any, verb: str, path: str, depth: int, origins: Mapping[str, str]) -> Iterator[str]:
    pad = "  " * depth
    kind: Any = type(section)
    texts = docstrings(kind)
    for field in section.__dataclass_fields__.values():
        key = key_of(field)
        if not reads(verb, joined(path, key)):
            continue
        value = getattr(section, field.name)
        yield from textwrap.wrap(texts[field.name], 116, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
        if hasattr(value, "__dataclass_fields__"):
            yield f"{pad}{key}:"
            yield from _commented(value, verb, joined(path, key), depth + 1, origins)
        else:
            plain = resolved(section)[key]
            text = yaml.safe_dump({key: plain}, sort_keys=False, allow_unicode=True, default_flow_style=False)
            origin = f"  # {origins[joined(path, key)]}" if joined(path, key) in origins else ""
            yield from (f"{pad}{line}{origin}" for line in text.splitlines())


def _header() -> list[str]:
    return ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]


def _options(group: str) -> list[str]:
    return (
        ["", f"Options: {', '.join(f'`{group}={option}`' for option in groups()[group])}."] if group in groups() else []
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print(reference(), end="")
