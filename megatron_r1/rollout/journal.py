"""Writes rollouts to disk before they are trained on: one file a step, whole or absent.

A file is a header line (format, step, count of samples, notes if there are any, types and shapes of the arrays), the
arrays of `FlatResponses`, one JSON line a sample with all else, and the BLAKE3 of it all. It is written to a temporary
file, synced, renamed, and the folder synced, so that a crash leaves either no file or a whole one; a file whose bytes
are not those that were written is refused. Floats come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Buffer, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import orjson
from blake3 import blake3

from megatron_r1.errors import DataError
from megatron_r1.files import replacing, sync
from megatron_r1.rollout.engine import Response
from megatron_r1.rollout.sample import Sample, response_of

FORMAT = 3
SUFFIX = ".rollout"
DIGEST = 32
"""Bytes of a BLAKE3."""


class FlatResponses(NamedTuple):
    """Several responses, one after the other, in one array of each kind: as they are written and sent."""

    lengths_S3: np.ndarray
    """Of each response: tokens of its prompt, its own, and inputs with recorded experts."""
    tokens: np.ndarray
    """Prompt, response, next prompt, ..., int32."""
    logprobs: np.ndarray
    experts_TNK: np.ndarray
    """Of recorded responses; empty where none is."""

    @classmethod
    def of(cls, responses: Sequence[Response]) -> Self:
        recorded = [one.routed_experts for one in responses if one.routed_experts is not None]
        inputs = [0 if one.routed_experts is None else len(one.routed_experts) for one in responses]
        pairs = zip(responses, inputs, strict=True)
        lengths = [(len(one.prompt_tokens), len(one.tokens), count) for one, count in pairs]
        tokens = [part for one in responses for part in (one.prompt_tokens, one.tokens)]
        return cls(
            np.array(lengths, np.int32).reshape(-1, 3),
            np.concatenate([np.empty(0, np.int32), *tokens]),
            np.concatenate([np.empty(0, np.float32), *(one.logprobs for one in responses)]),
            np.concatenate(recorded) if recorded else np.empty((0, 0, 0), np.uint8),
        )

    def responses(self) -> list[Response]:
        """Views of these arrays."""
        prompts_S, lengths_S, inputs_S = self.lengths_S3.T
        ends = np.stack([prompts_S, lengths_S], 1).ravel().cumsum(dtype=np.int64)[:-1]
        tokens = np.split(self.tokens, ends)
        logprobs = np.split(self.logprobs, lengths_S.cumsum(dtype=np.int64)[:-1])
        experts = np.split(self.experts_TNK, inputs_S.cumsum(dtype=np.int64)[:-1])
        return [
            Response(tokens[2 * index], tokens[2 * index + 1], logprobs[index], experts[index] if inputs else None)
            for index, inputs in enumerate(inputs_S.tolist())
        ]


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
        """
        flat = FlatResponses.of([response_of(sample) for sample in samples])
        header: dict[str, Any] = {"format": FORMAT, "step": step, "samples": len(samples)}
        if notes:
            header["notes"] = dict(notes)
        header["arrays"] = [(array.dtype.str, array.shape) for array in flat]
        rows = (orjson.dumps(_row(sample), option=orjson.OPT_APPEND_NEWLINE) for sample in samples)
        digest = blake3()
        arrays = (array.reshape(-1).view(np.uint8) for array in flat)
        with replacing(self.path(step)) as part, part.open("wb") as file:
            for block in chain[Buffer]([orjson.dumps(header, option=orjson.OPT_APPEND_NEWLINE)], arrays, rows):
                digest.update(block)
                file.write(block)
            file.write(digest.digest())
        return self.path(step)

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
            with path.open("rb") as file:
                first_line, rest = file.readline(), np.fromfile(file, np.uint8)
        except FileNotFoundError:
            return None
        try:
            header = orjson.loads(first_line)
            found = header["step"], header["format"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise DataError(f"{path}: damaged journal: its first line is no header") from None
        if found != (step, FORMAT):
            raise DataError(f"{path}: journal is of step {found[0]} and format {found[1]}")
        digest = blake3(first_line)
        digest.update(rest[:-DIGEST])
        if digest.digest() != rest[-DIGEST:].tobytes():
            raise DataError(f"{path}: damaged journal: its BLAKE3 is not the one at its end")
        arrays, start = [], 0
        for kind, shape in header["arrays"]:
            end = start + np.dtype(kind).itemsize * prod(shape)
            arrays.append(rest[start:end].view(kind).reshape(shape))
            start = end
        rows = rest[start:-DIGEST].tobytes().splitlines()
        responses = FlatResponses(*arrays).responses()
        samples = [_sample(orjson.loads(row), response) for row, response in zip(rows, responses, strict=True)]
        return samples, header.get("notes", {})

    def steps(self) -> list[int]:
        """The steps that have a file, ascending."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob(f"step-*{SUFFIX}"))

    def prune(self, before_step: int) -> None:
        """Remove the files of all steps below `before_step`."""
        for step in self.steps():
            if step < before_step:
                self.path(step).unlink()
        sync(self.folder)

    def remove_of_other_weights(self, step: int) -> list[int]:
        """Remove rollouts that were sampled by weights which a run that resumes at `step` will not have.

        Where the rollout of a later step is missing, the run samples that step anew, and its weights differ from then
        on. Rollouts that the earlier weights of that step, or of a later one, have sampled do not belong to it. Returns
        the steps whose files are removed.
        """
        later = [found for found in self.steps() if found > step]
        missing = next((here for here, found in enumerate(later, step + 1) if here != found), None)
        if missing is None:
            return []
        removed = [found for found in later if found > missing and _newest_weights(self.read(found)) >= missing]
        for found in removed:
            self.path(found).unlink()
        return removed

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}{SUFFIX}"


def _newest_weights(samples: Sequence[Sample] | None) -> int:
    """The newest version of weights, a count of steps, that sampled one of these; -1 for none."""
    versions = [
        [sample.weight_version, *(version for _, version in sample.version_changes)] for sample in samples or ()
    ]
    return max((int(version) for version in chain(*versions)), default=-1)


def _row(sample: Sample) -> dict[str, Any]:
    row = {field.name: getattr(sample, field.name) for field in fields(sample)}
    del row["response"]
    if sample.in_loss:
        del row["in_loss"]  # as nearly all are
    for name in ("version_changes", "steps"):
        if not row[name]:
            del row[name]
    return row


def _sample(row: dict[str, Any], response: Response) -> Sample:
    for name in ("version_changes", "steps"):
        row[name] = tuple((index, value) for index, value in row.get(name, ()))
    return Sample(**row, response=response)
