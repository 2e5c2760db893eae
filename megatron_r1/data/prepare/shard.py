"""A worker's job: writes one shard from its input spans, complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.data.prepare.encode import DocumentEncoder
from megatron_r1.data.prepare.sources import InputSpan, RawRecord, read
from megatron_r1.data.pretraining.indexed import IndexedWriter, token_dtype, with_suffix
from megatron_r1.data.pretraining.shards import shard_name
from megatron_r1.files import canonical_json, sync, write_whole

BATCH_CHARACTERS = 1 << 17
"""Characters that are encoded at once."""
WORK = "work"
"""Folder of the shards' records, inside the output; deleted once all shards are done."""


class ShardMaker:
    """Writes shards into one folder."""

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[str],
        fields: Sequence[str],
        vocab_size: int,
        encoder: DocumentEncoder,
        on_progress: Callable[[int], None],
    ):
        """
        Args:
            on_progress: called with the bytes of input done since its last call.
        """
        self._folder, self._inputs, self._fields, self._on_progress = folder, inputs, fields, on_progress
        self._dtype, self._encoder = token_dtype(vocab_size), encoder

    def make(self, number: int, spans: Sequence[InputSpan]) -> dict[str, Any]:
        """Write a shard and its record, and return the record.

        The record is written last: a shard without one is incomplete and is made again.
        """
        name = shard_name(number)
        part = self._folder / f"{name}.{os.getpid()}.tmp"
        counts = {"rows": 0, "documents": 0, "tokens": 0, "reordered": 0}
        left_out: dict[str, list[str]] = {"bad": [], "contaminated": []}
        with IndexedWriter(part, self._dtype) as writer:
            for span in spans:
                for rows in _batches(read(self._inputs[span.source], span, self._fields)):
                    encoded = self._encoder.encode(rows)
                    writer.add(encoded.tokens_T, encoded.lengths_N)
                    counts["rows"] += len(rows)
                    counts["documents"] += len(encoded.lengths_N)
                    counts["tokens"] += len(encoded.tokens_T)
                    counts["reordered"] += encoded.reordered
                    for kind, found in (("bad", encoded.bad), ("contaminated", encoded.contaminated)):
                        left_out[kind] += [f"{self._inputs[row.source]}:{row.number}:{why}" for row, why in found]
                self._on_progress(span.size)
        files = {}
        for suffix, digest in writer.digests.items():
            written, final = with_suffix(part, suffix), self._folder / f"{name}{suffix}"
            files[final.name] = {"size": written.stat().st_size, "sha256": digest}
            written.replace(final)
        if not counts["documents"]:  # megatron-core cannot map an empty file
            for file in files:
                (self._folder / file).unlink()
            files = {}
        sync(self._folder)
        record = {"name": name, "counts": counts, "files": files, **left_out}
        write_whole(record_path(self._folder, number), canonical_json(record))
        return record


def record_path(folder: Path, number: int) -> Path:
    """Path of a shard's record."""
    return folder / WORK / f"{shard_name(number)}.json"


def read_record(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a complete shard; None where the shard must be made."""
    try:
        record: dict[str, Any] = json.loads(record_path(folder, number).read_bytes())
        if all((folder / name).stat().st_size == file["size"] for name, file in record["files"].items()):
            return record
    except (OSError, ValueError):
        pass
    return None


def _batches(rows: Iterator[RawRecord]) -> Iterator[list[RawRecord]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.text) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
