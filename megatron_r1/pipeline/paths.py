"""Files and folders that the values of a configuration name, and hashes of their contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.manifest import MANIFEST_NAME
from megatron_r1.checkpoint.store import step_folders
from megatron_r1.config.recipes import prompt_styles
from megatron_r1.errors import DataError
from megatron_r1.files import canonical_json, digest_of, read_json, write_whole

NEEDED = ("*.path", "*.paths", "*.from", "*.init_from", "*_file", "*.models.*", "reward.*_model")
"""Keys whose values are paths of what must be there."""
PATH_KEYS = (*NEEDED, "*_function", "*.chat_template", "*.step_rewards", "*.review")
"""Keys whose values may be paths; of other keys, only a value with a slash may."""
PROMPT_STYLE = "sample.prompt_style"


class FileHashes:
    """Hashes of contents, kept in a file, so that what did not change is read once."""

    def __init__(self, cache: Path):
        self._cache = cache
        try:
            self._known = read_json(cache)
        except DataError:  # not written yet, or torn by a full disk: all is read again
            self._known = {}
        self._changed = False

    def of(self, path: Path) -> str:
        """Hash of a file, or of all files in a folder with their names; of a run or checkpoint, of its manifest."""
        if path.is_file():
            return self._file(path)
        if checkpoint := _checkpoint(path):
            return self._file(checkpoint / MANIFEST_NAME)
        names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        return hash_of([[str(name), self._file(path / name)] for name in names])

    def save(self) -> None:
        """Keep the hashes for the next time, once the folder of their file is there."""
        if self._changed and self._cache.parent.is_dir():
            write_whole(self._cache, canonical_json(self._known))
            self._changed = False

    def _file(self, path: Path) -> str:
        status, key = path.stat(), os.path.abspath(path)
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        if self._known.get(key, [None])[:-1] != stamp:
            self._known[key] = [*stamp, digest_of(path)]
            self._changed = True
        return str(self._known[key][-1])


def path_in(key: str, text: str) -> Path | None:
    """The path that a value names: without `hf:` before it, or a function's name behind it; None where it is none.

    A prompt style stands for the file of its text.
    """
    if key == PROMPT_STYLE:
        return prompt_styles().get(text, Path(text))
    if not text or not ("/" in text or is_among(key, PATH_KEYS)):
        return None
    file, _, function = text.removeprefix("hf:").rpartition(":")
    return Path(file if function and file.endswith(".py") else text.removeprefix("hf:"))


def is_among(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key fits one of some patterns."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def exists(path: Path) -> bool:
    """Whether something is there; a text that cannot be a path names nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def texts_of(value: Any) -> Iterator[str]:
    """Every text within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(part)


def hash_of(content: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint that a run or checkpoint folder gives."""
    if (path / MANIFEST_NAME).is_file():
        return path
    steps = step_folders(path / "checkpoints")
    return max((step for _, step in steps if (step / MANIFEST_NAME).is_file()), default=None)
