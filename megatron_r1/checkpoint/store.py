"""A folder of checkpoints, each of which is complete or does not exist.

    step-00000200.tmp/      being written; removed at the next start
    step-00000200/          committed: files and manifest were on disk before the rename
    .trash-step-00000100/   being removed
    .replaced-step-...      moved aside while a step is saved a second time
    .lock                   locked by the job that owns the folder; contains its host and process id

A commit is: write -> fsync every file -> manifest -> fsync -> rename -> fsync the parent. A process killed at any time
leaves the earlier checkpoints as they were. A save that fails removes what it wrote and raises `SaveFailed`, which
training may survive. Writing may continue in a thread while the run trains; `settle` does the rest.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from megatron_r1.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Records,
    everything,
    files_under,
    read_manifest,
    verify,
    write_manifest,
)
from megatron_r1.checkpoint.retention import Retention
from megatron_r1.errors import CheckpointDamaged, FolderInUse, UserError
from megatron_r1.files import Lock, is_held, sync, take_lock

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
Write = Callable[[Path], Records | None]
"""Writes a rank's files into a folder; returns the records of files that are already durable and hashed."""

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY, _TRASH, _REPLACED = ".tmp", ".trash-", ".replaced-"


class SaveFailed(UserError):
    """A checkpoint could not be saved; earlier ones are unchanged, and training may continue."""


class Ranks(Protocol):
    """The ranks that save together. All of them write; rank 0 makes the folder, writes the manifest and renames."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def gather(self, value: Value) -> list[Value]:
        """Collective: each rank's value, in rank order, on every rank."""
        ...


class OneRank:
    """The `Ranks` of a process that trains alone."""

    rank, size = 0, 1

    def gather(self, value: Value) -> list[Value]:
        return [value]


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every committed checkpoint in `folder`, verified or not, the newest first."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in matches if match and path.is_dir()), reverse=True)


def verify_together(path: Path, ranks: Ranks, needed: Callable[[str], bool] = everything) -> Manifest:
    """Collective: as `verify`; ranks divide the hashing of the files, and all get the same result."""
    manifest, failure = None, ""
    try:
        manifest = verify(path, ranks.rank, ranks.size, needed=needed)
    except CheckpointDamaged as error:
        failure = str(error)
    failures = [failure for failure in ranks.gather(failure) if failure]
    if failures or not manifest:
        raise CheckpointDamaged(failures[0])
    return manifest


def newest_verified(
    folder: Path, verified: Callable[[Path], Manifest] = verify, ranks: Ranks | None = None
) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest verifies; for readers, without a lock or any change.

    A damaged one is logged with the reason, and the next older one is tried. None when there is no checkpoint at all.

    Args:
        verified: verifies one checkpoint; `read_manifest` verifies its manifest alone.
        ranks: that look together, at the checkpoints that rank 0 finds; `verified` is then collective.

    Raises:
        CheckpointDamaged: there are checkpoints, but none of them verifies.
    """
    first: CheckpointDamaged | None = None
    for path in (ranks or OneRank()).gather([path for _, path in step_folders(folder)])[0]:
        try:
            manifest = verified(path)
        except CheckpointDamaged as error:
            logger.warning("%s; trying an older one", error)
            first = first or error
            continue
        if first:
            logger.warning("falling back to %s", path)
        return path, manifest
    if first:
        raise CheckpointDamaged(f"{first}; no other checkpoint in {folder} verifies")
    return None


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written."""

    step: int
    temporary: Path
    metadata: dict[str, Any]
    written: Future[Records | None]
    """Result of this rank's writer."""


class CheckpointStore:
    """The checkpoints of one run; owns `folder` until closed.

    Args:
        folder: created if missing. Incomplete folders of an interrupted job are removed from it.
        retention: which checkpoints `prune` keeps.
        ranks: the ranks that save together; every method is collective over them.

    Raises:
        FolderInUse: another job has locked the folder. The kernel releases the lock of a dead job.
    """

    def __init__(self, folder: Path, retention: Retention | None = None, ranks: Ranks | None = None):
        self.folder, self.retention, self.ranks = folder, retention or Retention(), ranks or OneRank()
        self._lock: Lock | None = None
        self._known_good: set[str] = set()
        self._save: _Save | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._together(self._open, leader_only=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder. Waits for a save that was not settled, which then does not become a checkpoint."""
        self._writer.shutdown()
        if self._lock:
            self._lock.close()
            self._lock = None

    def path(self, step: int) -> Path:
        """Path of the checkpoint of `step` once it is committed."""
        return self.folder / f"step-{step:08d}"

    def commit(self, step: int, write: Write, metadata: dict[str, Any]) -> Path:
        """Save one checkpoint: all of it, or nothing.

        Args:
            write: called on every rank with the same empty folder; must not be collective, so that no rank waits for
                one that failed.
            metadata: of the manifest, to which `step` is added; rank 0's value is used.

        Raises:
            SaveFailed: on every rank, when any rank failed, for example because of a full disk; its files are removed.
        """
        self.begin(step, write, metadata)
        self.settle()
        return self.path(step)

    def begin(self, step: int, write: Write, metadata: dict[str, Any], *, background: bool = False) -> None:
        """Start to save a checkpoint, which `settle` completes; otherwise as `commit`.

        There is at most one save at a time: an earlier one must have been settled.

        Args:
            background: whether `write` runs in a thread while the caller continues. Its data must not be changed
                meanwhile, and it must not communicate with other ranks.

        Raises:
            SaveFailed: on every rank, when the folder cannot be created.
        """
        if self._save:
            raise ValueError(f"step {self._save.step} is still being saved")
        temporary = self.folder / (self.path(step).name + _TEMPORARY)
        self._together(lambda: self._prepare(temporary), leader_only=True)
        written = self._writer.submit(write, temporary) if background else _done(write, temporary)
        self._save = _Save(step, temporary, metadata | {"step": step}, written)

    @property
    def saving(self) -> bool:
        """Whether a save was started and not settled; the same on every rank."""
        return self._save is not None

    def written(self) -> bool:
        """Whether every rank has finished writing, with or without an error, so that `settle` does not wait."""
        assert self._save
        return all(self.ranks.gather(self._save.written.done()))

    def settle(self) -> None:
        """Wait for the save that was started, if there is one, and make it a checkpoint.

        Raises:
            SaveFailed: as `commit`.
        """
        save, self._save = self._save, None
        if not save:
            return
        try:
            records: dict[str, FileRecord] = {}
            for of_rank in self._together(save.written.result):
                records |= of_rank or {}
            self._together(lambda: self._seal(save.temporary, save.metadata, records), leader_only=True)
            self._together(lambda: self._publish(save.temporary, self.path(save.step)), leader_only=True)
        except SaveFailed:
            if self.ranks.rank == 0:
                _remove(save.temporary)
            raise
        self._known_good.add(self.path(save.step).name)

    def newest_verified(self) -> tuple[Path, Manifest] | None:
        """As the function of this name; ranks divide the hashing of the files, and all get the same result."""
        found = newest_verified(self.folder, lambda path: verify_together(path, self.ranks), self.ranks)
        if found:
            self._known_good.add(found[0].name)
        return found

    def discard(self, unwanted: Callable[[Manifest], bool]) -> None:
        """Remove the checkpoints whose manifests say that they are unwanted, also those that another process reads.

        Raises:
            SaveFailed: one could not be removed.
        """
        self._together(lambda: self._discard_unwanted(unwanted), leader_only=True)

    def prune(self) -> None:
        """Remove checkpoints that are older than the newest verified ones, except those that the retention keeps and
        those that another process reads; a failed removal is logged."""
        verified = 0
        checkpoints = self.ranks.gather(step_folders(self.folder))[0]
        kept = self.retention.beside_newest(checkpoints) if self.ranks.rank == 0 else set()
        for _, path in checkpoints:
            if verified < self.retention.newest:
                verified += self._verifies(path)
            elif self.ranks.rank == 0 and path not in kept:
                self._discard(path)

    def _verifies(self, path: Path) -> bool:
        # Verifying checkpoints that this process committed or loaded would cost a full read at every save.
        if path.name not in self._known_good:
            try:
                verify_together(path, self.ranks)
            except CheckpointDamaged:
                return False
            self._known_good.add(path.name)
        return True

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.folder / ".lock")
        for path in sorted(self.folder.iterdir()):
            original = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not original.exists():
                path.rename(original)  # killed between the two renames of `_publish`
            elif path.name.startswith((_TRASH, _REPLACED)) or path.name.endswith(_TEMPORARY):
                logger.info("removing %s, left by an interrupted job", path)
                _remove(path)

    def _prepare(self, temporary: Path) -> None:
        _remove(temporary)
        temporary.mkdir()

    def _seal(self, temporary: Path, metadata: dict[str, Any], records: Records) -> None:
        for name, path in files_under(temporary).items():
            if name not in records:
                sync(path)
        write_manifest(temporary, metadata, records)
        for parent, _, _ in temporary.walk():
            sync(parent)

    def _publish(self, temporary: Path, final: Path) -> None:
        replaced = final.with_name(_REPLACED + final.name)
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync(self.folder)
        _remove(replaced)

    def _discard_unwanted(self, unwanted: Callable[[Manifest], bool]) -> None:
        for _, path in step_folders(self.folder):
            with suppress(CheckpointDamaged):  # it is never read
                if unwanted(read_manifest(path)):
                    logger.info("removing %s", path)
                    self._move_to_trash(path)

    def _discard(self, path: Path) -> None:
        if is_held(path / MANIFEST_NAME):
            logger.info("%s is being read; it is removed after a later save", path)
            return
        try:
            self._move_to_trash(path)
        except OSError as error:
            logger.warning("cannot remove %s: %s", path, error)

    def _move_to_trash(self, path: Path) -> None:
        """Renamed first, so that an interrupted removal does not leave a folder that looks like a checkpoint."""
        trash = path.with_name(_TRASH + path.name)
        path.rename(trash)
        sync(self.folder)
        self._known_good.discard(path.name)
        _remove(trash)

    def _together(self, action: Callable[[], Value], leader_only: bool = False) -> list[Value | None]:
        """Run `action` on every rank; if it fails on any, all ranks raise.

        Returns:
            every rank's result.
        """
        error: BaseException | None = None
        result: Value | None = None
        if self.ranks.rank == 0 or not leader_only:
            try:
                result = action()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as caught:  # torch's CheckpointException is no Exception
                error = caught
        outcomes = self.ranks.gather((result, f"{type(error).__name__}: {error}" if error else ""))
        if isinstance(error, FolderInUse):
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure:
                where = f" on rank {rank}" if len(outcomes) > 1 else ""
                raise SaveFailed(f"cannot write to {self.folder}: {failure}{where}") from error
        return [result for result, _ in outcomes]


def _done(write: Write, folder: Path) -> Future[Records | None]:
    """The result of `write`, called in this thread, as a completed future."""
    future: Future[Records | None] = Future()
    try:
        future.set_result(write(folder))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        future.set_exception(error)
    return future


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link (never its target); a failed removal is logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
