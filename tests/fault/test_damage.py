"""Bits that flip, files that end early or are gone: all damage is detected, and the checkpoint before it is used."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.checkpoint.manifest import files_under
from megatron_r1.checkpoint.store import newest_verified, step_folders
from megatron_r1.errors import ExitCode
from tests.support.jobs import PRETRAIN, SHORT, Job, comparable, run_alone

PARTS_LEFT = (0.0, 0.25, 0.5, 0.9, 0.99)
"""Of a file that is cut short."""
WITHOUT_ROOTS_POWERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


@pytest.fixture
def checkpoints(root: Path, pretrained: object, tmp_path: Path) -> Path:
    """A copy of what a run on two ranks has left: the checkpoints of its last two saves."""
    return Path(shutil.copytree(root / "base" / "checkpoints", tmp_path / "checkpoints"))


@contextmanager
def changed(path: Path, change: Callable[[Path], None]) -> Iterator[None]:
    whole = path.read_bytes()
    change(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def flip(bit: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return change


def cut(part_left: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * part_left))


def falls_back(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the older checkpoint is used, and the log names it and the reason."""
    (_, newest), (_, older) = step_folders(checkpoints)
    caplog.clear()
    found = newest_verified(checkpoints)
    fell_back = f"checkpoint {newest}: " in caplog.text and f"falling back to {older}" in caplog.text
    return found is not None and found[0] == older and fell_back


@pytest.mark.dist
@pytest.mark.parametrize("flips", [150, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_every_flipped_bit_is_noticed(flips, checkpoints, caplog):
    """Half of the flips hit any bit of the checkpoint, so mostly tensors; half any file, so also the small ones."""
    caplog.set_level(logging.WARNING)
    chance, newest = random.Random(flips), step_folders(checkpoints)[0][1]
    paths = sorted(files_under(newest).values())
    sizes = [path.stat().st_size for path in paths]
    for number in range(flips):
        path = chance.choices(paths, sizes if number % 2 else None)[0]
        bit = chance.randrange(8 * path.stat().st_size)
        with changed(path, flip(bit)):
            assert falls_back(checkpoints, caplog), f"bit {bit} of {path}"
    found = newest_verified(checkpoints)
    assert found and found[0] == newest
    print(f"{flips} flips in {len(paths)} files of {sum(sizes)} bytes: all noticed")


@pytest.mark.dist
def test_every_cut_or_missing_file_is_noticed(checkpoints, caplog):
    caplog.set_level(logging.WARNING)
    newest = step_folders(checkpoints)[0][1]
    paths = sorted(files_under(newest).values())
    changes = [*map(cut, PARTS_LEFT), Path.unlink]
    for path in paths:
        for number, change in enumerate(changes):
            with changed(path, change):
                assert falls_back(checkpoints, caplog), f"{path} changed by number {number}"
    (newest / "added").touch()
    assert falls_back(checkpoints, caplog)
    print(f"{len(paths) * len(changes)} files cut short or gone: all noticed")
    assert len(paths) * len(changes) >= 60


@pytest.mark.dist
def test_a_run_resumes_from_the_checkpoint_before(root, pretrained, tmp_path):
    """One file of the newest checkpoint cannot be read; later no checkpoint is left that verifies."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root, which reads every file unless it gives that power up by setpriv")
    job = Job([*PRETRAIN, *SHORT], tmp_path, "damaged")
    shutil.copytree(root / "base", job.folder)
    pinned = job.folder / "config.yaml"
    pinned.write_text(pinned.read_text().replace(str(root), str(tmp_path)).replace("name: base", "name: damaged"))
    (_, newest), (_, older) = step_folders(job.folder / "checkpoints")
    (newest / "model-00000.safetensors").chmod(0)
    done = run_alone(job, *WITHOUT_ROOTS_POWERS)
    assert done.returncode == 0, done.stderr
    assert f"{newest}: model-00000.safetensors cannot be read (Permission denied)" in done.stderr
    assert f"falling back to {older}" in done.stderr
    assert len(comparable(job.rows)) == len(pretrained)
    for _, checkpoint in step_folders(job.folder / "checkpoints"):
        flip(12345)(checkpoint / "model-00000.safetensors")
    done = run_alone(replace(job, forked=True))
    assert done.returncode == ExitCode.CHECKPOINT_DAMAGED
    assert "no other checkpoint in" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
