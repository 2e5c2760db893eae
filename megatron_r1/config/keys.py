"""Which keys a verb reads; a key that a verb never reads is refused, because it would silently have no effect.

Overrides on the command line and the keys of a recipe file are checked. The files of groups (`model=v3_671b`) and
`_base.yaml` are exempt: several verbs share them, and each reads a part of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.config.recipes import configs_folder, groups
from megatron_r1.config.schema import exists, joined, shown
from megatron_r1.config.verbs import GENERAL, VERBS, Verb
from megatron_r1.errors import ConfigError

INSTEAD = {
    ("grpo", "train.micro_batch_size"): "rl.tokens_per_micro_batch sets the size of a forward pass",
    ("grpo", "train.sequence_length"): "model.max_sequence_length and rollout.max_response_tokens set lengths",
    ("grpo", "train.global_batch_size"): "rl.prompts_per_rollout x rl.group_size / rl.updates_per_rollout is the batch",
    ("grpo", "watch.max_rewinds"): "its data is what its own weights sample, none of which could be skipped",
    ("evaluate", "rollout.temperature"): "evaluate.temperature is that of the sampled responses",
    ("evaluate", "model"): "each model's shape is read from its checkpoint",
    ("sample", "model"): "the model's shape is read from its checkpoint",
    ("diagnose", "model"): "the model's shape is read from its checkpoint",
}
"""Verb and key -> what to use instead."""


def reads(verb: str, key: str) -> bool:
    """Whether the verb reads a key, or any key of a section."""
    return _reads(VERBS[verb], key)


@lru_cache(maxsize=16384)
def _reads(verb: Verb, key: str) -> bool:
    listed = dict.fromkeys((*GENERAL, *verb.reads), True) | dict.fromkeys(verb.ignores, False)
    parents = [name for name in listed if key == name or key.startswith(f"{name}.")]
    if parents:
        return listed[max(parents, key=len)]
    return any(held and name.startswith(f"{key}.") for name, held in listed.items())


def check_overrides(verb: str, overrides: Sequence[str]) -> None:
    """Refuse an override that the verb never reads.

    Raises:
        ConfigError: names the key, its value and what the verb reads.
    """
    for line in overrides:
        for key, value in overridden(line):
            _refuse_unread(verb, key, value)


def overridden(line: str) -> Iterator[tuple[str, object]]:
    """Key and value of an override, and of what is in a value such as {a:1}."""
    written, _, value = line.partition("=")
    key = written.lstrip("+~")
    yield key, value
    if value.lstrip().startswith("{"):
        yield from _leaves(_mapping(value), key)


def check_recipe(verb: str, recipe: str) -> None:
    """Refuse a recipe file that itself sets a key which the verb never reads.

    Raises:
        ConfigError: names the key, its value and what the verb reads.
    """
    for key, value in keys_of_recipe(recipe):
        _refuse_unread(verb, key, value)


def keys_of_recipe(recipe: str) -> Iterator[tuple[str, object]]:
    """Keys that a recipe file itself sets, with their values."""
    path = configs_folder() / f"{recipe}.yaml"
    try:
        yield from _keys_of_file(path, path.stat().st_mtime_ns)
    except (yaml.YAMLError, FileNotFoundError):
        return  # composing the recipe reports the error


@lru_cache(maxsize=256)
def _keys_of_file(path: Path, _: int) -> tuple[tuple[str, object], ...]:
    """Kept until the file is written again."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    leaves = _leaves(tree if isinstance(tree, dict) else {}, "")
    return tuple((key, value) for key, value in leaves if key != "defaults")


def only_read(verb: str, overrides: Sequence[str]) -> list[str]:
    """The overrides that the verb reads, of those that a recipe gives to all its stages."""
    return [line for line in overrides if reads(verb, line.partition("=")[0].lstrip("+~"))]


def _refuse_unread(verb: str, key: str, value: object) -> None:
    if not exists(key) or reads(verb, key):
        return
    instead = next((text for (name, known), text in INSTEAD.items() if name == verb and _within(key, known)), "")
    if verb == "pipeline":
        instead = f"give it to stages: pipeline.overrides=[{key}=...] or pipeline.stages.NAME.overrides"
    sections = ", ".join(dict.fromkeys(name.split(".")[0] for name in (*GENERAL, *VERBS[verb].reads)))
    what = "group" if key in groups() else "key"
    reason = f"{verb} never reads this {what}; {instead or f'it reads {sections}'}"
    raise ConfigError(key, shown(value), reason)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _leaves(tree: dict[Any, Any], path: str) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, joined(path, name))
        else:
            yield joined(path, name), value


def _mapping(text: str) -> dict[Any, Any]:
    """A value such as {a:1} of an override, where it is one."""
    try:
        tree = yaml.safe_load(text.replace(":", ": "))
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}
