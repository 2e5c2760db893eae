"""The identity of a stage, by which a recipe knows what is up to date: a hash of all that its result follows from.

It holds the verb; the value of every key that the verb reads, as composed from recipe, groups and overrides; the
identities of the stages whose outputs it takes; and the content of files and folders that a value names (prompts,
conversations, a Hugging Face folder, a user's own function), in place of their paths.

It does not hold what leaves results the same: names of the stage, of its inputs and of the recipe's folder; the keys of
`FREE_TO_CHANGE` (threads, platform, tracking, degrees of parallelism, servers, intervals of logs and checkpoints);
which other stages merely run before it (`needs`); and the form of the YAML. Nor does it hold what a recipe cannot
follow: versions of this program and of packages, the machine, environment variables, and models behind an API.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_r1.pipeline.compose import ComposedStage
from megatron_r1.pipeline.paths import NEEDED, FileHashes, exists, hash_of, is_among, path_in, texts_of
from megatron_r1.runs.folder import FREE_TO_CHANGE

LENGTH = 16
"""Hexadecimal digits of an identity, and of a file's hash within it."""


@dataclass(frozen=True)
class StageIdentity:
    """What a stage's result follows from."""

    digest: str
    settings: Mapping[str, Any]
    """Key -> value; a path within is {NAME} where it is an input's, and a content's hash where it is a file's."""
    inputs: Mapping[str, str]
    """Name -> identity of the stage and type of its output."""

    def as_record(self) -> dict[str, Any]:
        """The form in which a stage's folder keeps it."""
        return {"identity": self.digest, "settings": dict(self.settings), "inputs": dict(self.inputs)}


def identities_of(stages: Mapping[str, ComposedStage], files: FileHashes) -> dict[str, StageIdentity]:
    """The identity of every stage; the stages must be in order."""
    found: dict[str, StageIdentity] = {}
    for name, stage in stages.items():
        inputs = {key: f"{found[output.stage].digest}.{output.type}" for key, output in stage.inputs.items()}
        found[name] = _identity(stage, inputs, files)
    files.save()
    return found


def _identity(stage: ComposedStage, inputs: Mapping[str, str], files: FileHashes) -> StageIdentity:
    settings = {
        key: _map_texts(value, partial(_without_path, key=key, inputs=stage.paths, files=files))
        for key, value in stage.settings.items()
        if key not in ("name", "root") and not key.startswith(FREE_TO_CHANGE)
    }
    content = _map_texts(settings, lambda text: _with_identities(text, inputs))
    return StageIdentity(hash_of([stage.verb, content])[:LENGTH], settings, inputs)


def missing_files(stage: ComposedStage) -> list[str]:
    """Paths that a stage names and that are not there: neither files nor outputs of other stages."""
    return [
        text
        for key, value in stage.settings.items()
        if is_among(key, NEEDED)
        for text in texts_of(value)
        if (path := path_in(key, text)) and text not in stage.paths.values() and not exists(path)
    ]


def changes(before: Mapping[str, Any], identity: StageIdentity, stages: Mapping[str, str]) -> list[str]:
    """What differs between the record of an earlier run and what the recipe says now.

    Args:
        before: as `StageIdentity.as_record`.
        stages: name of an input -> stage that gives it.
    """
    old, new, old_inputs = before.get("settings", {}), identity.settings, before.get("inputs", {})
    keys = [key for key in dict(old) | dict(new) if old.get(key) != new.get(key)]
    found = [f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}" for key in keys]
    return found + [
        f"input {key}: {f'{stages[key]} changed' if key in old_inputs else 'new'}"
        for key, digest in identity.inputs.items()
        if old_inputs.get(key) != digest
    ]


def _without_path(text: str, key: str, inputs: Mapping[str, str], files: FileHashes) -> str:
    """A text of a setting with {NAME} for the path of an input, or the content's hash where it names a file."""
    for name, path in sorted(inputs.items(), key=lambda item: -len(item[1])):
        if text == path or text.startswith(f"{path}/"):
            return f"{{{name}}}{text.removeprefix(path)}"
    file = path_in(key, text)
    return f"sha256:{files.of(file)[:LENGTH]}" if file and exists(file) else text


def _with_identities(text: str, inputs: Mapping[str, str]) -> str:
    """A text with the identities of inputs in place of their names."""
    for name, identity in inputs.items():
        text = text.replace(f"{{{name}}}", f"{{{identity}}}")
    return text


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text within changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(part, change) for key, part in value.items()}
    return [_map_texts(part, change) for part in value] if isinstance(value, list) else value
