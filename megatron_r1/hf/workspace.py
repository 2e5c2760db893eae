"""Where a conversion keeps the files that it has finished, so that the next call resumes from there.

NAME.tmp/files/      what is to be published
NAME.tmp/records/    for each finished file: its size and digest, and the audit of its tensors
NAME.tmp/settings    hash of what is converted and how; another conversion starts anew
NAME.tmp/lock        held while a call is at work here
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.digest import digest_of_file
from megatron_r1.checkpoint.manifest import FileRecord
from megatron_r1.errors import DataError
from megatron_r1.files import canonical_json, take_lock, write_whole


@dataclass(frozen=True)
class ConversionWorkspace:
    """The folder of one conversion."""

    root: Path

    @property
    def files(self) -> Path:
        return self.root / "files"

    def record(self, file_name: str, file: FileRecord, audit: dict[str, Any]) -> None:
        """Note that a file is finished; it must be durable already."""
        content = {**asdict(file), "audit": audit}
        write_whole(self._record_path(file_name), canonical_json(content))

    def finished(self, file_names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records of the files that are there as they were recorded, to the last bit; what else is there is removed."""
        with ThreadPoolExecutor() as pool:
            found = zip(file_names, pool.map(self._verified, file_names), strict=True)
            records = {name: record for name, record in found if record}
        for path in [*self.files.iterdir(), *(self.root / "records").iterdir()]:
            if path.name.removesuffix(".json") not in records:
                path.unlink()
        return records

    def records(self, file_names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records of finished files."""
        return {name: json.loads(self._record_path(name).read_bytes()) for name in file_names}

    def written_bytes(self) -> int:
        """How much is on disk by now."""
        return sum(path.stat().st_size for path in self.files.iterdir())

    def _verified(self, file_name: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(self._record_path(file_name).read_bytes())
            path = self.files / file_name
            right = path.stat().st_size == record["size"] and digest_of_file(path) == record["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if right else None

    def _record_path(self, file_name: str) -> Path:
        return self.root / "records" / f"{file_name}.json"


@contextmanager
def open_workspace(root: Path, settings: str) -> Iterator[ConversionWorkspace]:
    """Make or find a conversion's folder; it is removed when the block ends well, or with a refusal of what is read.

    After any other end it stays, and a call with the same settings resumes with what is finished in it.

    Args:
        settings: hash of what is converted and how.

    Raises:
        FolderInUse: another call is at work there.
    """
    root.mkdir(parents=True, exist_ok=True)
    with take_lock(root / "lock", "another conversion writes there"):
        workspace, note = ConversionWorkspace(root), root / "settings"
        if not note.is_file() or note.read_text() != settings:
            for name in ("files", "records"):
                shutil.rmtree(root / name, ignore_errors=True)
        for name in ("files", "records"):
            (root / name).mkdir(exist_ok=True)
        write_whole(note, settings.encode())
        try:
            yield workspace
        except DataError:
            shutil.rmtree(root)
            raise
        shutil.rmtree(root)
