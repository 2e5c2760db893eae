"""A folder of checkpoints, each of which is whole or not there.

    step-00000200.tmp/      being written; removed at the next start
    step-00000200/          committed: files and manifest were on disk before the rename
    .trash-step-00000100/   being removed
    .replaced-step-...      moved aside while a step is saved a second time
    .lock                   held by the job that owns the folder, with its host and process id

A commit is: write -> fsync every file -> manifest -> fsync -> rename -> fsync the parent. A process killed at any time
leaves the earlier checkpoints as they were. A save that fails removes what it wrote and raises `SaveFailed`, which
training may survive.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, TypeVar

from megatron_r1.checkpoint.manifest import Manifest, files_under, verify, write_manifest
from megatron_r1.errors import CheckpointDamaged, ExitCode, UserError
from megatron_r1.files import sync

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY, _TRASH, _REPLACED = ".tmp", ".trash-", ".replaced-"


class SaveFailed(UserError):
    """A checkpoint could not be saved; the earlier ones are untouched, and training may go on."""


class FolderInUse(UserError):
    """Another job writes its checkpoints to this folder."""

    exit_code = ExitCode.BAD_CONFIG


class Ranks(Protocol):
    """The ranks that save together. Rank 0 prepares, seals and publishes; all of them write."""

    @property
    def rank(self) -> int: ...

    def gather(self, value: Value) -> list[Value]:
        """Collective: each rank's value, in rank order, on every rank."""
        ...


class OneRank:
    """The `Ranks` of a process that trains alone."""

    rank = 0

    def gather(self, value: Value) -> list[Value]:
        return [value]


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every committed checkpoint in `folder`, verified or not, the newest first."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in matches if match and path.is_dir()), reverse=True)


def newest_verified(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest verifies, for readers: takes no lock and changes nothing.

    A damaged one is logged with the reason and the next older one tried. None when there is no checkpoint at all.

    Raises:
        CheckpointDamaged: there are checkpoints, and none of them verifies.
    """
    first: CheckpointDamaged | None = None
    for _, path in step_folders(folder):
        try:
            manifest = verify(path)
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


class CheckpointStore:
    """The checkpoints of one run; owns `folder` until closed.

    Args:
        folder: made when missing. What an interrupted job left half done in it is removed.
        keep: verified checkpoints that `prune` leaves, at least 2.
        ranks: the ranks that save together; every method is collective over them.

    Raises:
        FolderInUse: another job holds the folder. A dead job's lock is no obstacle: the kernel let go of it.
    """

    def __init__(self, folder: Path, keep: int = 2, ranks: Ranks | None = None):
        if keep < 2:
            raise ValueError(f"keep={keep}: must be at least 2, or a damaged checkpoint has none to fall back on")
        self.folder, self.keep, self.ranks = folder, keep, ranks or OneRank()
        self._lock: IO[str] | None = None
        self._known_good: set[str] = set()
        self._together(self._open, leader_only=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, once committed."""
        return self.folder / f"step-{step:08d}"

    def commit(self, step: int, write: Callable[[Path], None], metadata: dict[str, Any]) -> Path:
        """Save one checkpoint: all of it, or nothing.

        Args:
            write: called on every rank with the same empty folder; a rank that fails must not leave the others waiting.
            metadata: goes into the manifest, with `step` added; rank 0's counts.

        Raises:
            SaveFailed: on every rank, when any rank failed, a full disk for one. What was written has been removed.
        """
        temporary = self.folder / (self.path(step).name + _TEMPORARY)
        try:
            self._together(lambda: self._prepare(temporary), leader_only=True)
            self._together(lambda: write(temporary))
            self._together(lambda: self._seal(temporary, metadata | {"step": step}), leader_only=True)
            self._together(lambda: self._publish(temporary, self.path(step)), leader_only=True)
        except SaveFailed:
            if self.ranks.rank == 0:
                _remove(temporary)
            raise
        self._known_good.add(self.path(step).name)
        return self.path(step)

    def newest_verified(self) -> tuple[Path, Manifest] | None:
        """As the function of this name; rank 0 reads and hashes, all ranks receive its answer."""
        found: tuple[Path, Manifest] | None = None
        failure = ""
        if self.ranks.rank == 0:
            try:
                found = newest_verified(self.folder)
            except CheckpointDamaged as error:
                failure = str(error)
        found, failure = self.ranks.gather((found, failure))[0]
        if failure:
            raise CheckpointDamaged(failure)
        if found:
            self._known_good.add(found[0].name)
        return found

    def prune(self) -> None:
        """Remove what is older than the `keep` newest verified checkpoints. What cannot be removed is logged."""
        if self.ranks.rank != 0:
            return
        verified = 0
        for _, path in step_folders(self.folder):
            if verified >= self.keep:
                self._discard(path)
            elif self._verifies(path):
                verified += 1

    def _verifies(self, path: Path) -> bool:
        # Hashing again what this process itself committed or loaded would cost a full read at every save.
        if path.name not in self._known_good:
            try:
                verify(path)
            except CheckpointDamaged:
                return False
            self._known_good.add(path.name)
        return True

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder / ".lock")
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

    def _seal(self, temporary: Path, metadata: dict[str, Any]) -> None:
        for path in files_under(temporary).values():
            sync(path)
        write_manifest(temporary, metadata)
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

    def _discard(self, path: Path) -> None:
        # Renamed first: a removal that is cut short leaves no folder that could pass for a checkpoint.
        trash = path.with_name(_TRASH + path.name)
        try:
            path.rename(trash)
            sync(self.folder)
        except OSError as error:
            logger.warning("cannot remove %s: %s", path, error)
            return
        self._known_good.discard(path.name)
        _remove(trash)

    def _together(self, action: Callable[[], None], leader_only: bool = False) -> None:
        """Run `action`, then let every rank know whether any failed; the ranks raise together or go on together."""
        error: BaseException | None = None
        if self.ranks.rank == 0 or not leader_only:
            try:
                action()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as caught:  # torch's CheckpointException is no Exception
                error = caught
        failures = self.ranks.gather(f"{type(error).__name__}: {error}" if error else "")
        if isinstance(error, FolderInUse):
            raise error
        for rank, failure in enumerate(failures):
            if failure:
                where = f" on rank {rank}" if len(failures) > 1 else ""
                raise SaveFailed(f"cannot write to {self.folder}: {failure}{where}") from error


def _take_lock(path: Path) -> IO[str]:
    """Hold `path` until the returned file is closed or this process ends."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise FolderInUse(f"{path.parent} is in use by {owner}: two jobs cannot write to one run") from error
    file.truncate(0)
    file.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
    file.flush()
    return file


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link (never what a link points to); what cannot be removed is logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
