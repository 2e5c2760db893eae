"""Lines reach the terminal and the rank's file as their level, rank and origin say; a refused run gets no file."""

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from megatron_r1.track.logs import FILE_ONLY, logging_to

ours, library = logging.getLogger("megatron_r1.some.module"), logging.getLogger("library")
STAMP = r"\d\d:\d\d:\d\d"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def say_all() -> None:
    ours.debug("our debug")
    ours.info("our info")
    ours.warning("our warning")
    ours.error("told otherwise", extra=FILE_ONLY)
    library.warning("library warning")
    library.error("library error")
    warnings.warn("python warning", UserWarning, stacklevel=1)


@pytest.mark.parametrize("rank", [0, 3])
def test_each_line_reaches_whom_it_concerns(run: Path, rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to(run, rank):
            say_all()
    shown = capsys.readouterr().err.splitlines()
    assert [re.findall(rf"^{STAMP} (\w+) \S+ rank {rank}: (.+)$", line) for line in shown] == [
        *([[("INFO", "our info")]] if rank == 0 else []),
        [("WARNING", "our warning")],
        [("ERROR", "library error")],
    ]
    file = (run / "logs" / f"rank-{rank:05}.log").read_text()
    for word in ("our info", "our warning", "told otherwise", "library warning", "library error", "python warning"):
        assert word in file
    assert "debug" not in file and re.search(rf"^\d+-\d\d-\d\d {STAMP}\S* INFO \S+ rank {rank} megatron_r1\.some", file)


def test_a_resumed_run_appends(run: Path) -> None:
    for number in (1, 2):
        with logging_to(run, 0):
            ours.info("start %d", number)
    text = (run / "logs" / "rank-00000.log").read_text()
    assert text.index("start 1") < text.index("start 2")


def test_lines_wait_for_the_folder_and_a_refused_run_gets_none(tmp_path: Path) -> None:
    with logging_to(tmp_path / "refused", 0):
        ours.info("early")
    assert not (tmp_path / "refused").exists()
    with logging_to(tmp_path / "run", 0):
        ours.info("early")
        (tmp_path / "run").mkdir()
        ours.info("late")
    lines = (tmp_path / "run" / "logs" / "rank-00000.log").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["early", "late"]


def test_everything_is_undone(run: Path) -> None:
    root, package = logging.getLogger(), logging.getLogger("megatron_r1")
    before = [*root.handlers], package.level, warnings.showwarning
    with logging_to(run, 0):
        assert len(root.handlers) == len(before[0]) + 2
    assert ([*root.handlers], package.level, warnings.showwarning) == before


def test_a_line_stands_above_a_progress_bar(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=sys.stderr, force_terminal=True, width=200)
    with logging_to(run, 0), Progress(console=console) as bar:
        bar.add_task("training", total=3)
        bar.refresh()
        ours.info("in the middle")
        bar.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    [line] = [line for line in lines if "in the middle" in line]
    assert "training" not in line
