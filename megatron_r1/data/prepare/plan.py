"""The plan of a tokenised folder: which spans of which files make which shard.

It depends on the inputs and the options alone, not on the number of workers. It is written into the folder before the
first shard, so that a restarted program continues the same plan.
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
    """All shards to make, and what they are made from."""

    description: dict[str, Any]
    """Format, options, fingerprints of tokenizer and files, as JSON values: equal descriptions give equal shards."""
    shards: list[list[InputSpan]]

    @property
    def input_bytes(self) -> int:
        return sum(span.size for shard in self.shards for span in shard)


def make_plan(options: TokeniseOptions, tokenizer: Tokenizer) -> Plan:
    """Scan all inputs and divide them into shards of about `options.shard_bytes`.

    Raises:
        ConfigError: a file has an unknown suffix.
        DataError: a file cannot be read.
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
    for span in (span for found in scans for span in found.spans):
        if not shards or size + span.size // 2 > target:
            shards.append([])
            size = 0
        shards[-1].append(span)
        size += span.size
    return shards


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to resume in a folder that was started with other inputs or options.

    Raises:
        DataError: names the first difference.
    """
    if found == wanted:
        return
    old, new = found.get("options", {}), wanted["options"]
    for key in new:
        if old.get(key) != new[key]:
            raise DataError(f"{folder}: was started with {key}={old.get(key)}, not {new[key]}; choose another output")
    for key, name in (("tokenizer", "another tokenizer"), ("inputs", "other inputs"), ("decontaminate", "other sets")):
        if found.get(key) != wanted[key]:
            paths = [
                path for path, a, b in zip(new.get(key, ()), found.get(key, ()), wanted[key], strict=False) if a != b
            ]
            changed = f": {paths[0]} has changed" if key != "tokenizer" and paths else ""
            raise DataError(f"{folder}: was started with {name}{changed}; choose another output")
    raise DataError(f"{folder}: was started by another version of this program; choose another output")
