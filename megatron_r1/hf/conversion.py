"""From a source to files, a few tensors in memory at a time, by threads and processes; an interrupted one resumes.

In each process, threads read, convert and hash the next tensors while the last ones are written.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_r1.checkpoint.manifest import FileRecord
from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, TensorFile
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import UserError
from megatron_r1.hf.ahead import ahead
from megatron_r1.hf.audit import Audit, audit_of_mapping
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.plan import FileSegment, PlannedFile, plan_files
from megatron_r1.hf.source import Source, digest_of_value
from megatron_r1.hf.target import Target
from megatron_r1.hf.workspace import ConversionWorkspace


class Converted(NamedTuple):
    """A segment of a file, ready to be written."""

    tensors: dict[str, Tensor]
    audit: Audit


class ConversionStopped(UserError):
    """A conversion could not go on; what is finished stays, and the same command resumes from there."""


@dataclass(frozen=True)
class Conversion:
    """What is converted, and into what."""

    source: Source
    target: Target
    model: ModelConfig
    """Of what is written: the source's, but for its type and the size of its vocabulary."""
    shard_bytes: int

    def files(self) -> list[PlannedFile]:
        """The files to be written."""
        return plan_files(param_mappings(self.model), self.target.entries, self.shard_bytes, self.target.file_name)

    def settings(self) -> str:
        """Hash of all that decides what is written."""
        plan = [
            [file.name, [[entry.name, TYPE_NAMES[entry.dtype], entry.shape] for entry in file.entries]]
            for file in self.files()
        ]
        return digest_of_value([self.source.fingerprint(), repr(self.target), plan])


def convert_files(
    conversion: Conversion, workspace: ConversionWorkspace, workers: int = 1
) -> dict[str, dict[str, Any]]:
    """Write what is not finished yet.

    Args:
        workers: processes that divide the files among themselves; with 1 this process writes them.

    Returns:
        Record of each file by name: size, digest and audit.

    Raises:
        DataError: a tensor is not what it must be.
        ConversionStopped: a process died or the disk is full.
    """
    names = [file.name for file in conversion.files()]
    finished = workspace.finished(names)
    waiting = [number for number, name in enumerate(names) if name not in finished]
    try:
        if workers == 1 or len(waiting) < 2:
            write_files(conversion, workspace, waiting)
        else:
            _divide(conversion, workspace, [waiting[first::workers] for first in range(min(workers, len(waiting)))])
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or workspace.files}"
        raise ConversionStopped(f"{reason}; the same command resumes with what is finished") from error
    return workspace.records(names)


def write_files(conversion: Conversion, workspace: ConversionWorkspace, numbers: Sequence[int]) -> None:
    """Write files of the plan, one after the other, each recorded when it is durable."""
    all_files = conversion.files()
    files = [all_files[number] for number in numbers]
    source_mappings = {mapping.native: mapping for mapping in conversion.source.mappings()}
    with conversion.source.open() as reader:

        def convert(segment: FileSegment) -> Converted:
            mapping = segment.mapping
            found = reader.read(source_mappings[mapping.native])
            fitted = [part.with_rows(shape[0]) for part, shape in zip(found.parts, mapping.part_shapes, strict=True)]
            encoded = conversion.target.encode(mapping, fitted)
            here = {entry.name: encoded[entry.name] for entry in segment.entries}
            return Converted(here, audit_of_mapping(found.source, encoded, here))

        with ahead(convert, [segment for file in files for segment in file.segments]) as converted:
            for planned in files:
                file, audit = write_file(planned, converted, conversion.target, workspace.files)
                workspace.record(planned.name, file, audit)


def write_file(
    planned: PlannedFile, converted: Iterator[Converted], target: Target, folder: Path
) -> tuple[FileRecord, Audit]:
    """Write one file.

    Args:
        converted: gives its segments, in order.

    Returns:
        Its record, and the audit of its tensors.
    """
    entries, metadata = target.header(planned.entries)
    names_in_file = iter(entries)
    audit: Audit = {"read": {}, "written": {}}
    with TensorFile(folder / planned.name, entries, metadata) as file:
        for segment in islice(converted, len(planned.segments)):
            for name, tensor in segment.tensors.items():
                file.write(next(names_in_file).name, tensor, segment.audit["written"][name]["blake3"])
            for kind, described in segment.audit.items():
                audit[kind].update(described)
        return file.close(), audit


def _divide(conversion: Conversion, workspace: ConversionWorkspace, shares: list[list[int]]) -> None:
    """Let a process write each share; the first that fails ends the others."""
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        for share in shares:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_write_share, args=(theirs, write_files, conversion, workspace, share), daemon=True
            )
            process.start()
            theirs.close()  # so that its end shows here
            processes[mine] = process
        running = set(processes)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                running.remove(connection)
                try:
                    failure = connection.recv()
                except EOFError:
                    processes[connection].join()
                    code = processes[connection].exitcode
                    died = f"process {processes[connection].pid} of the conversion ended with status {code}"
                    raise ConversionStopped(f"{died}; the same command resumes with what is finished") from None
                if failure:
                    raise failure
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _write_share(
    connection: Connection,
    write: Callable[[Conversion, ConversionWorkspace, Sequence[int]], None],
    conversion: Conversion,
    workspace: ConversionWorkspace,
    numbers: Sequence[int],
) -> None:
    """What one process does: its share, then None or what went wrong to the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that started this ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        write(conversion, workspace, numbers)
    except (UserError, OSError) as error:
        connection.send(error)
    else:
        connection.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
