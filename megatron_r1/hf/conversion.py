"""From a source to files, one tensor in memory at a time: by several processes, and going on after an interruption."""

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
from megatron_r1.hf.audit import audit_of_row
from megatron_r1.hf.names import rows
from megatron_r1.hf.plan import PlannedFile, plan_files
from megatron_r1.hf.row import Row
from megatron_r1.hf.source import Source, Taken, digest_of_value
from megatron_r1.hf.target import Target
from megatron_r1.hf.work import Work


class ConversionStopped(UserError):
    """A conversion could not go on; what is finished stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Conversion:
    """What is converted, and into what."""

    source: Source
    target: Target
    model: ModelConfig
    """Of what is written: the source's, but for its type and the rows of its vocabulary."""
    shard_bytes: int

    def files(self) -> list[PlannedFile]:
        """The files to be written."""
        return plan_files(rows(self.model), self.target.entries, self.shard_bytes, self.target.file_name)

    def settings(self) -> str:
        """Hash of all that decides what is written."""
        plan = [
            [file.name, [[entry.name, TYPE_NAMES[entry.dtype], entry.shape] for entry in file.entries]]
            for file in self.files()
        ]
        return digest_of_value([self.source.fingerprint(), repr(self.target), plan])


def convert_files(conversion: Conversion, work: Work, workers: int = 1) -> dict[str, dict[str, Any]]:
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
    finished = work.finished(names)
    waiting = [number for number, name in enumerate(names) if name not in finished]
    try:
        if workers == 1 or len(waiting) < 2:
            write_files(conversion, work, waiting)
        else:
            _divide(conversion, work, [waiting[first::workers] for first in range(min(workers, len(waiting)))])
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or work.files}"
        raise ConversionStopped(f"{reason}; the same command goes on with what is finished") from error
    return work.records(names)


def write_files(conversion: Conversion, work: Work, numbers: Sequence[int]) -> None:
    """Write files of the plan, one after the other, each recorded when it is durable."""
    if not numbers:
        return
    files = conversion.files()
    there = {row.native: row for row in rows(conversion.source.model)}
    with conversion.source.open() as reader:

        def take(row: Row) -> Taken:
            taken = reader.take(there[row.native])
            fitted = [part.with_rows(shape[0]) for part, shape in zip(taken.parts, row.part_shapes, strict=True)]
            return Taken(fitted, taken.read)

        for number in numbers:
            file, audit = write_file(files[number], take, conversion.target, work.files)
            work.record(files[number].name, file, audit)


def write_file(
    planned: PlannedFile, take: Callable[[Row], Taken], target: Target, folder: Path
) -> tuple[FileRecord, dict[str, Any]]:
    """Write one file; returns its record and the audit of its tensors."""
    entries, metadata = target.header(planned.entries)
    names_in_file = iter(entries)
    read: dict[str, Any] = {}
    written: dict[str, Any] = {}
    # Its hashes are taken while the same tensors are written: both leave Python's lock to others.
    with TensorFile(folder / planned.name, entries, metadata) as file, ThreadPoolExecutor(1) as hashing:
        for piece in planned.pieces:
            taken = take(piece.row)
            encoded = target.encode(piece.row, taken.parts)
            here = {entry.name: encoded[entry.name] for entry in piece.entries}
            hashes = hashing.submit(audit_of_row, taken.read, encoded, here)
            for tensor in here.values():
                file.write(next(names_in_file).name, tensor)
            audit = hashes.result()
            read.update(audit["read"])
            written.update(audit["written"])
        record = file.close()
    return record, {"read": read, "written": written}


def _divide(conversion: Conversion, work: Work, shares: list[list[int]]) -> None:
    """Let a process write each share; the first that fails ends the others."""
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        for share in shares:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, write_files, conversion, work, share), daemon=True)
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
                    raise ConversionStopped(f"{died}; the same command goes on with what is finished") from None
                if failure:
                    raise failure
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _work(
    connection: Connection,
    write: Callable[[Conversion, Work, Sequence[int]], None],
    conversion: Conversion,
    work: Work,
    numbers: Sequence[int],
) -> None:
    """What one process does: its share, then None or what went wrong to the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that started this ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        write(conversion, work, numbers)
    except (UserError, OSError) as error:
        connection.send(error)
    else:
        connection.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
