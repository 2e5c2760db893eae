"""The folder for sockets is TMPDIR while its path is short enough, else one of the system's."""

from __future__ import annotations

import multiprocessing.connection
import tempfile
from pathlib import Path

import pytest

from megatron_r1.errors import PlatformError
from megatron_r1.platform import temporary
from megatron_r1.platform.temporary import INSIDE, SOCKET_BYTES, folder_for_sockets, home_for_caches


@pytest.fixture
def own(monkeypatch):
    """Sets TMPDIR, which `tempfile` reads once in a process."""

    def set_to(folder: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", str(folder))

    yield set_to
    tempfile.tempdir = None


@pytest.fixture
def short():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def of_length(folder: Path, length: int, letter: str = "x") -> Path:
    left = length - len(str(folder).encode()) - 1
    path = folder / (letter * (left // len(letter.encode())))
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u95ee"])
@pytest.mark.parametrize("excess", [1, 20, 60, 100])
def test_a_path_that_is_too_long_is_not_taken(own, short, letter, excess, caplog):
    caplog.set_level("INFO")
    own(of_length(short, SOCKET_BYTES - INSIDE + excess + 2, letter))
    assert folder_for_sockets() == Path("/tmp") and "is too long for sockets" in caplog.text


@pytest.mark.parametrize("room", [0, 10])
def test_a_short_path_is_taken_and_holds_sockets(own, short, room):
    folder = of_length(short, SOCKET_BYTES - INSIDE - room)
    own(folder)
    assert folder_for_sockets() == folder
    path = str(folder) + "/" + "y" * (INSIDE - 1)
    with multiprocessing.connection.Listener(path, "AF_UNIX"):
        assert Path(path).is_socket()


def test_a_folder_that_is_not_there_is_replaced(own):
    own(Path("/no/such/folder"))
    assert folder_for_sockets() in (Path("/tmp"), Path("/var/tmp"))


def test_no_folder_at_all_is_an_error_of_one_line(own, short, monkeypatch):
    folder = of_length(short, 100)
    own(folder)
    monkeypatch.setattr(temporary, "OTHERS", ("/no/such/folder",))
    with pytest.raises(PlatformError, match=f"^TMPDIR={folder}: must have at most {SOCKET_BYTES - INSIDE} characters"):
        folder_for_sockets()


def test_a_home_that_can_be_written_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_for_caches(Path("/x")) == {}


@pytest.mark.parametrize("home", ["/no/such/home", "/proc/nothing", "/dev/null"])
def test_a_home_that_cannot_be_written_is_replaced(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert home_for_caches(Path("/x")) == {"HOME": "/x"}
