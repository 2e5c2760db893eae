"""A progress bar of bytes on disk, whoever writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_INTERVAL_S = 0.25


@contextmanager
def bytes_on_disk(written: Callable[[], int], total: int, title: str) -> Iterator[None]:
    """Show how far the writing is, its throughput and the time left, while the block runs.

    Args:
        written: bytes on disk by now.
        total: bytes in the end.
        title: name of the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    done = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)

        def follow() -> None:
            while not done.wait(_INTERVAL_S):
                progress.update(task, completed=min(written(), total))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
