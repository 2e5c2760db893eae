"""From a source to files, one tensor in memory at a time, by several processes; an interrupted conversion resumes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_r1.checkpoint.manifest import FileRecord
from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, TensorFile
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import UserError
from megatron_r1.hf.audit import audit_of_mapping
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.param_mapping import ParamMapping
from megatron_r1.hf.plan import PlannedFile, plan_files
from megatron_r1.hf.source import Source, TensorRead, digest_of_value
from megatron_r1.hf.target import Target
from megatron_r1.hf.workspace import ConversionWorkspace


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
        Record of each file by name: size, sha256 and audit.

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
    if not numbers:
        return
    files = conversion.files()
    source_mappings = {mapping.native: mapping for mapping in param_mappings(conversion.source.model)}
    with conversion.source.open() as reader:

        def read_tensors(mapping: ParamMapping) -> TensorRead:
            found = reader.read(source_mappings[mapping.native])
            fitted = [part.with_rows(shape[0]) for part, shape in zip(found.parts, mapping.part_shapes, strict=True)]
            return TensorRead(fitted, found.source)

        for number in numbers:
            file, audit = write_file(files[number], read_tensors, conversion.target, workspace.files)
            workspace.record(files[number].name, file, audit)


def write_file(
    planned: PlannedFile, read_tensors: Callable[[ParamMapping], TensorRead], target: Target, folder: Path
) -> tuple[FileRecord, dict[str, Any]]:
    """Write one file; returns its record and the audit of its tensors."""
    entries, metadata = target.header(planned.entries)
    names_in_file = iter(entries)
    read: dict[str, Any] = {}
    written: dict[str, Any] = {}
    # Its hashes are taken while the same tensors are written: both leave Python's lock to others.
    with TensorFile(folder / planned.name, entries, metadata) as file, ThreadPoolExecutor(1) as hashing:
        for segment in planned.segments:
            found = read_tensors(segment.mapping)
            encoded = target.encode(segment.mapping, found.parts)
            here = {entry.name: encoded[entry.name] for entry in segment.entries}
            hashes = hashing.submit(audit_of_mapping, found.source, encoded, here)
            for tensor in here.values():
                file.write(next(names_in_file).name, tensor)
            audit = hashes.result()
            read.update(audit["read"])
            written.update(audit["written"])
        record = file.close()
    return record, {"read": read, "written": written}


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
