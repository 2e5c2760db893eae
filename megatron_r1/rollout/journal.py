"""Writes rollouts to disk before they are trained on: one file a step, whole or absent.

A file is a header line (format, step, count of samples, notes if there are any, sha256 of notes and the rest) and one
JSON line a sample. It is written to a temporary file, synced, renamed, and the folder synced, so that a crash leaves
either no file or a whole one; a file whose bytes are not those that were written is refused. Floats come back bit for
bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.errors import DataError
from megatron_r1.files import sync, write_whole
from megatron_r1.rollout.engine import check_logprobs
from megatron_r1.rollout.routed_experts import RoutedExperts
from megatron_r1.rollout.sample import Sample

FORMAT = 1
SUFFIX = ".jsonl"


class Journal:
    """The rollouts of a run, by step.

    Args:
        folder: of the files; made when it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()

    def write(self, step: int, samples: Sequence[Sample], notes: Mapping[str, int] | None = None) -> Path:
        """Write the samples of a step, in place of an earlier file of the step. Returns the file's path.

        Args:
            notes: counts of how the rollout was sampled.

        Raises:
            ValueError: the log-probs of a sample cannot be trained on.
        """
        for sample in samples:
            check_logprobs(sample.logprobs)
        body = b"".join(orjson.dumps(_row(sample), option=orjson.OPT_APPEND_NEWLINE) for sample in samples)
        header: dict[str, Any] = {"format": FORMAT, "step": step, "samples": len(samples)}
        if notes:
            header["notes"] = dict(notes)
        header["sha256"] = _digest(header, body)
        path = self.path(step)
        write_whole(path, orjson.dumps(header, option=orjson.OPT_APPEND_NEWLINE) + body)
        return path

    def read(self, step: int) -> list[Sample] | None:
        """The samples of a step as they were written, or None when the step has no file.

        Raises DataError when the file is not what was written.
        """
        found = self.read_all(step)
        return found[0] if found else None

    def read_all(self, step: int) -> tuple[list[Sample], dict[str, int]] | None:
        """As `read`, with the notes; none give an empty dict."""
        path = self.path(step)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        first_line, _, body = content.partition(b"\n")
        try:
            header = orjson.loads(first_line)
            expected = {"format": FORMAT, "step": step, "samples": header["samples"], "sha256": header["sha256"]}
            notes = header.get("notes", {})
            if notes:
                expected["notes"] = notes
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise DataError(f"{path}: damaged journal: its first line is no header") from None
        if header != expected:
            raise DataError(f"{path}: journal is of step {header.get('step')} and format {header.get('format')}")
        if _digest(header, body) != header["sha256"]:
            raise DataError(f"{path}: damaged journal: its sha256 is not the one in its header")
        samples = [_sample(orjson.loads(line)) for line in body.splitlines()]
        if len(samples) != header["samples"]:
            raise DataError(f"{path}: damaged journal: {len(samples)} samples, {header['samples']} in its header")
        return samples, notes

    def steps(self) -> list[int]:
        """The steps that have a file, ascending."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob(f"step-*{SUFFIX}"))

    def prune(self, before_step: int) -> None:
        """Remove the files of all steps below `before_step`."""
        for step in self.steps():
            if step < before_step:
                self.path(step).unlink()
        sync(self.folder)

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}{SUFFIX}"


def _digest(header: Mapping[str, Any], body: bytes) -> str:
    notes = orjson.dumps(header["notes"]) if "notes" in header else b""
    return hashlib.sha256(notes + body).hexdigest()


def _row(sample: Sample) -> dict[str, Any]:
    row = asdict(sample)
    if sample.in_loss:
        del row["in_loss"]  # as nearly all are
    for name in ("version_changes", "steps"):
        if not row[name]:
            del row[name]
    return row


def _sample(row: dict[str, Any]) -> Sample:
    for name in ("prompt_tokens", "response_tokens", "logprobs"):
        row[name] = tuple(row[name])
    for name in ("version_changes", "steps"):
        row[name] = tuple((index, value) for index, value in row.get(name, ()))
    if routed := row.get("routed_experts"):
        row["routed_experts"] = RoutedExperts(tuple(routed["shape"]), routed["data"])
    return Sample(**row)
