"""The plan of a tokenised folder: which pieces of which files make which shard.

It depends on the inputs and the options alone, never on the number of workers, and is pinned in the folder before the
first shard is made, so that a program that is started again does the rest of the same work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.sources import InputSpan, Scan, check_suffix, scan
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What is to be done, in full."""

    description: dict[str, Any]
    """Format, options, fingerprints of tokenizer and files, as JSON values: equal for equal results."""
    shards: list[list[InputSpan]]

    @property
    def input_bytes(self) -> int:
        return sum(piece.size for shard in self.shards for piece in shard)


def make_plan(options: TokeniseOptions, tokenizer: Tokenizer) -> Plan:
    """Scan all inputs and divide them into shards of about `options.shard_bytes`.

    Raises:
        ConfigError, DataError: a file is of no known kind or cannot be read.
    """
    for path in options.decontaminate:
        check_suffix(path, "decontaminate")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        target = options.shard_bytes
        scans = list(pool.map(lambda item: scan(item[1], item[0], target), enumerate(options.inputs)))
        evaluations = list(pool.map(_digest, options.decontaminate))
    description = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "options": asdict(options),
        "inputs": [found.sha256 for found in scans],
        "decontaminate": evaluations,
    }
    return Plan(json.loads(json.dumps(description)), _shards(scans, target))


def _shards(scans: Sequence[Scan], target: int) -> list[list[InputSpan]]:
    shards: list[list[InputSpan]] = []
    size = 0
    for piece in (piece for found in scans for piece in found.pieces):
        if not shards or size + piece.size // 2 > target:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.size
    return shards


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to go on in a folder that was begun with other inputs or options.

    Raises:
        DataError: names what differs first.
    """
    if found == wanted:
        return
    old, new = found.get("options", {}), wanted["options"]
    for key in new:
        if old.get(key) != new[key]:
            raise DataError(f"{folder}: was begun with {key}={old.get(key)}, not {new[key]}; choose another output")
    for key, name in (("tokenizer", "another tokenizer"), ("inputs", "other inputs"), ("decontaminate", "other sets")):
        if found.get(key) != wanted[key]:
            paths = [
                path for path, a, b in zip(new.get(key, ()), found.get(key, ()), wanted[key], strict=False) if a != b
            ]
            changed = f": {paths[0]} has changed" if key != "tokenizer" and paths else ""
            raise DataError(f"{folder}: was begun with {name}{changed}; choose another output")
    raise DataError(f"{folder}: was begun by another version of this program; choose another output")
