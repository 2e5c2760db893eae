"""Logging to the user's terminal, and to a file per rank in the run's folder.

The terminal shows INFO of this package on rank 0 and WARNING on other ranks. The file has all of that and the warnings
of libraries. Of libraries, only errors are shown on the terminal: a user can seldom fix their warnings.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PACKAGE = "megatron_r1"
FOLDER = "logs"
MAX_WAITING = 1000
FILE_ONLY = {"file_only": True}
"""`extra` of a record that is shown on the terminal in another form."""


@contextmanager
def logging_to(run_folder: Path | None, rank: int) -> Iterator[None]:
    """Set up logging for one command, and undo it at the end.

    Args:
        run_folder: folder for `logs/rank-NNNNN.log`, to which a resumed run appends; None writes no file.
    """
    root, package = logging.getLogger(), logging.getLogger(PACKAGE)
    line = f"%(asctime)s %(levelname)s {socket.gethostname()} rank {rank}: %(message)s".replace("\n", " ")
    terminal = _Terminal(logging.INFO if rank == 0 else logging.WARNING)
    terminal.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    handlers: list[logging.Handler] = [terminal]
    if run_folder:
        file = _RankFile(run_folder, rank)
        file.setFormatter(logging.Formatter(line.replace(": %(message)s", " %(name)s: %(message)s")))
        handlers.append(file)
    level = package.level
    package.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        package.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a progress bar replaces to show lines above itself."""

    def __init__(self, level: int):
        logging.Handler.__init__(self, level)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        own = record.name.partition(".")[0] == PACKAGE
        return not getattr(record, "file_only", False) and (own or record.levelno >= logging.ERROR)


class _RankFile(logging.FileHandler):
    """Appends to a rank's file once the run's folder exists; a refused run has no folder and gets none for its log."""

    def __init__(self, run_folder: Path, rank: int):
        super().__init__(run_folder / FOLDER / f"rank-{rank:05}.log", encoding="utf-8", errors="replace", delay=True)
        self._run_folder = run_folder
        self._waiting: deque[logging.LogRecord] = deque(maxlen=MAX_WAITING)

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(record)
        if not self._run_folder.is_dir():
            return
        try:
            Path(self.baseFilename).parent.mkdir(exist_ok=True)
            while self._waiting:
                super().emit(self._waiting.popleft())
        except OSError:
            # A full disk must not end the run through its log; saving the run will report it.
            self.handleError(record)
