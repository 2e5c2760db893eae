"""The manifest of a checkpoint folder: every file's size and digest, and the settings that made the checkpoint.

Checkpoint formats do not detect a flipped bit: a damaged shard loads, and training continues with wrong numbers. The
manifest detects it: `verify` accepts a folder only if its files are exactly the listed ones, to the last bit, the
manifest's own bytes included.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.digest import digests
from megatron_r1.errors import CheckpointDamaged
from megatron_r1.files import canonical_json, hold

MANIFEST_NAME = "manifest.json"
TENSORS = ".safetensors"
FORMAT = 3
"""In formats 1 and 2, digests were made by SHA-256."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file's size in bytes, and its digest as checkpoint/digest.py describes it."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`.

    Args:
        files: path relative to the folder, with forward slashes -> record.
        metadata: settings that made the checkpoint, as JSON values: step, config, data fingerprint, layout, versions.
    """

    files: dict[str, FileRecord]
    metadata: dict[str, Any]

    def encode(self) -> bytes:
        """The canonical byte string of this manifest, which contains its own hash."""
        body = {
            "format": FORMAT,
            "files": {name: asdict(record) for name, record in self.files.items()},
            "metadata": self.metadata,
        }
        digest = hashlib.sha256(canonical_json(body)).hexdigest()
        return canonical_json(body | {"sha256": digest}) + b"\n"

    @staticmethod
    def decode(raw: bytes, folder: Path) -> Manifest:
        """The inverse of `encode`. Raises CheckpointDamaged unless `raw` is exactly the output of `encode`."""
        try:
            body = json.loads(raw)
            files = {name: FileRecord(record["size"], record["digest"]) for name, record in body["files"].items()}
            manifest = Manifest(files, body["metadata"])
            unchanged = body["format"] == FORMAT and manifest.encode() == raw
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(folder, MANIFEST_NAME, "is not a manifest that can be read") from error
        if not unchanged:
            raise _damaged(folder, MANIFEST_NAME, f"does not match its own hash, or is not of format {FORMAT}")
        return manifest


Records = Mapping[str, FileRecord]
"""Files by their path relative to a folder."""


def write_manifest(folder: Path, metadata: dict[str, Any], records: Records | None = None) -> Manifest:
    """Write and fsync the manifest of all files under `folder`.

    Args:
        metadata: JSON values; tuples become lists and keys become strings.
        records: of the files that their writers hashed; other files are read and hashed here.

    Raises:
        TypeError, ValueError: `metadata` contains a value that JSON does not support, for example NaN.
        OSError: a file differs from its record or cannot be read, or the manifest cannot be written.
    """
    records, paths = records or {}, files_under(folder)
    for name, record in records.items():
        if name not in paths or (size := paths[name].stat().st_size) != record.size:
            found = f"{size} bytes" if name in paths else "nothing"
            raise OSError(f"{folder / name}: {record.size} bytes were written, but the file has {found}")
    others = [name for name in paths if name not in (MANIFEST_NAME, *records)]
    others_digests = zip(others, digests([paths[name] for name in others]), strict=True)
    hashed = {name: FileRecord(paths[name].stat().st_size, digest) for name, digest in others_digests}
    files = dict(sorted({**records, **hashed}.items()))
    manifest = Manifest(files, json.loads(json.dumps(metadata, allow_nan=False)))
    with (folder / MANIFEST_NAME).open("wb") as file:
        file.write(manifest.encode())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, verified against its own hash; files are not verified. Raises CheckpointDamaged."""
    try:
        raw = (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError as error:
        raise _damaged(folder, MANIFEST_NAME, "is missing") from error
    except OSError as error:
        raise _damaged(folder, MANIFEST_NAME, f"cannot be read ({error.strerror})") from error
    return Manifest.decode(raw, folder)


def everything(name: str) -> bool:
    """Whether a reader of the whole checkpoint needs a file."""
    return True


def needed_for(kind: str) -> Callable[[str], bool]:
    """A function of a file's name: whether a reader of one kind of tensors, ``model`` or ``ema``, needs the file."""
    return lambda name: not name.endswith(TENSORS) or name.startswith(f"{kind}-")


def without_tensors(name: str) -> bool:
    """Whether a reader of all but tensors needs a file."""
    return not name.endswith(TENSORS)


def verify(
    folder: Path,
    share: int = 0,
    shares: int = 1,
    on_file: Callable[[int], None] = lambda _: None,
    needed: Callable[[str], bool] = everything,
) -> Manifest:
    """Read the manifest of `folder` and compare files with it, before anything else reads the files.

    Args:
        share: index of this reader among `shares` readers, which divide the hashing among them.
        on_file: called with the size of each file, in bytes, once it has been hashed.
        needed: which files are compared, by name; none may be there that the manifest does not list.

    Raises:
        CheckpointDamaged: names the first wrong file and the reason: missing, not listed, other size or other content.
    """
    manifest = read_manifest(folder)
    held = hold(folder / MANIFEST_NAME)  # hashing takes longer than its run's next saves
    try:
        present = files_under(folder)
        present.pop(MANIFEST_NAME)
        compared = {name: record for name, record in manifest.files.items() if needed(name)}
        for name in sorted(compared.keys() - present.keys()):
            raise _damaged(folder, name, "is missing")
        for name in sorted(present.keys() - manifest.files.keys()):
            raise _damaged(folder, name, "is not in the manifest")
        for name, record in compared.items():
            path = present[name]
            if path.is_symlink() or not path.is_file():
                raise _damaged(folder, name, "is not a plain file")
            if (size := path.stat().st_size) != record.size:
                raise _damaged(folder, name, f"has {size} bytes instead of {record.size}")
        mine = divided({name: record.size for name, record in compared.items()}, shares)[share]
        for name, digest in zip(mine, digests([present[name] for name in mine]), strict=True):
            if digest != (recorded := compared[name]).digest:
                raise _damaged(folder, name, f"has digest {digest[:12]}... instead of {recorded.digest[:12]}...")
            on_file(recorded.size)
    except OSError as error:
        raise _damaged(folder, Path(error.filename or "?").name, f"cannot be read ({error.strerror})") from error
    finally:
        if held:
            held.close()
    return manifest


def divided(sizes: Mapping[str, int], shares: int) -> list[list[str]]:
    """Names in so many shares of nearly equal sizes: the largest first, each to the share that has least so far."""
    loads, found = [(0, share) for share in range(shares)], [list[str]() for _ in range(shares)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, share = loads[0]
        found[share].append(name)
        heapq.heapreplace(loads, (load + sizes[name], share))
    return found


def files_under(folder: Path) -> dict[str, Path]:
    """All files under `folder` by relative path; links are listed, not followed."""
    return {
        path.relative_to(folder).as_posix(): path
        for parent, folders, files in folder.walk(on_error=_raise)
        for path in (parent / name for name in [*files, *(name for name in folders if (parent / name).is_symlink())])
    }


def _damaged(folder: Path, name: str, what: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"checkpoint {folder}: {name} {what}")


def _raise(error: OSError) -> None:
    raise error
