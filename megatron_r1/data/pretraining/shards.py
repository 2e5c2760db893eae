"""A folder of tokenised shards, the output of `tools/tokenise.py`.

`manifest.json` lists every file with its size and SHA-256 and contains its own hash; it is written last, so that a
folder without one is unfinished. `tokenizer/` holds the tokenizer of the ids, `quarantine.txt` every dropped row as
file:row:reason.

The manifest of a checkpoint has another format (`checkpoint/manifest.py`). This one also describes the tokens, and a
folder can be opened without hashing terabytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.pretraining.indexed import IndexedTokens
from megatron_r1.errors import DataError
from megatron_r1.files import canonical_json, digest_of, write_whole

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
QUARANTINE = "quarantine.txt"


def shard_name(number: int) -> str:
    """Prefix of a shard's two files."""
    return f"shard-{number:05d}"


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write the manifest, which completes a folder.

    Args:
        body: "files": name -> {"size", "sha256"}, "shards": prefixes in order, "plan", "totals".
    """
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    write_whole(folder / MANIFEST, canonical_json(body | {"sha256": digest}) + b"\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest, verified against its own hash; None where there is none.

    Raises:
        DataError: the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        digest = body.pop("sha256")
        if hashlib.sha256(canonical_json(body)).hexdigest() != digest:
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise DataError(f"{path}: is damaged: it does not match its own hash") from error
    return body


def verify(folder: Path, files: dict[str, dict[str, Any]], hashes: bool) -> None:
    """Compare every file with the manifest.

    Args:
        hashes: compare contents too, not sizes alone.

    Raises:
        DataError: names the first file that differs, and the difference.
    """
    for name, record in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record["size"]:
                raise DataError(f"{path}: has {size} bytes instead of {record['size']}")
            if hashes and (digest := digest_of(path)) != record["sha256"]:
                raise DataError(f"{path}: has SHA-256 {digest[:12]}... instead of {record['sha256'][:12]}...")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Shards:
    """The documents of a folder, all shards as one list."""

    folder: Path
    manifest: dict[str, Any]
    parts: list[IndexedTokens]
    first_document: np.ndarray
    """Number of each shard's first document, and the number of all documents: int64 [shards + 1]."""
    lengths: np.ndarray
    """Tokens of every document: int64 [documents]."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop - 1` of one document, as stored."""
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        return self.parts[shard].document(document - int(self.first_document[shard]))[start:stop]


def open_shards(folder: Path, hashes: bool = True) -> Shards:
    """Open a finished folder.

    Args:
        hashes: verify every file's SHA-256, not its size alone; reads all of it once.

    Raises:
        DataError: the folder is unfinished or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: holds no {MANIFEST}: must be the finished output of tools/tokenise.py")
    verify(folder, manifest["files"], hashes)
    parts = [IndexedTokens(folder / name) for name in manifest["shards"]]
    lengths = [np.diff(part.bounds) for part in parts]
    first = np.cumsum([0, *map(len, lengths)], dtype=np.int64)
    return Shards(folder, manifest, parts, first, np.concatenate([np.empty(0, np.int64), *lengths]))
