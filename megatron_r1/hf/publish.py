"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_r1.errors import DataError
from megatron_r1.files import sync


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it takes the name `folder` when the block ends well.

    On an error the half-written folder is removed and what was at `folder` stays. An earlier export there is replaced.

    Raises:
        DataError: `folder` exists and is neither empty nor an earlier export, so it must not be replaced.
    """
    folder = Path(folder)
    check_replaceable(folder)
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def publish(unfinished: Path, folder: Path) -> None:
    """Make what was written durable and give it the name `folder`; an earlier export there is replaced."""
    for file in unfinished.iterdir():
        if not file.is_symlink():
            sync(file)
    sync(unfinished)
    earlier = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    unfinished.rename(folder)
    sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """
    Raises:
        DataError: `folder` exists and is neither empty nor an earlier export, so it must not be replaced.
    """
    if folder.exists() and not _replaceable(folder):
        raise DataError(f"{folder}: exists and is no Hugging Face folder; name a new folder")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))
