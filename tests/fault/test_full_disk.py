"""A disk that fills up while a run saves: training continues, older checkpoints stay, and nothing is half there."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_r1.checkpoint.manifest import verify
from megatron_r1.checkpoint.store import step_folders
from megatron_r1.errors import ExitCode
from tests.support.jobs import (
    ATTEMPT_S,
    INTERVAL,
    PRETRAIN,
    SHORT,
    STEPS,
    Job,
    Launcher,
    comparable,
    end_of,
    launched,
    ranks_of,
    run_alone,
)

ROOM = "48m"
"""About four checkpoints."""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at `folder`, for which it takes root."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def wait_until(condition: Callable[[], bool], launcher: Launcher) -> None:
    deadline = time.monotonic() + ATTEMPT_S
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def suspended(job: Job, launcher: Launcher) -> Iterator[None]:
    ranks = ranks_of(job, launcher).values()
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


@pytest.mark.dist
@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_training_continues_while_the_disk_is_full(background, root, pretrained):
    job = Job([*PRETRAIN, *SHORT, f"train.async_save={background}"], root, f"full-{background}", forked=True)
    checkpoints, ballast = job.folder / "checkpoints", job.folder / "checkpoints" / "ballast"
    with small_disk(checkpoints):
        with launched(job) as launcher:
            wait_until(lambda: job.saved > 0, launcher)
            fill(ballast)
            saved = {step for step, _ in step_folders(checkpoints)}
            wait_until(lambda: job.log.count("training continues") >= 2, launcher)
            with suspended(job, launcher):  # the run would otherwise end before there is room again
                for step, checkpoint in step_folders(checkpoints):
                    verify(checkpoint)
                    assert step in saved or step == max(saved) + INTERVAL  # the one that was under way
                ballast.unlink()
            assert end_of(job, launcher) == 0, job.log
        assert comparable(job.rows) == pretrained
        assert [step for step, _ in step_folders(checkpoints)] == [STEPS, STEPS - INTERVAL]
        assert {path.name for path in checkpoints.iterdir()} == {
            ".lock", f"step-{STEPS:08}", f"step-{STEPS - INTERVAL:08}"
        }  # fmt: skip
    failures = [line for line in job.log.splitlines() if "training continues" in line]
    assert all("No space left on device" in line for line in failures)
    print(f"background={background}: {len(failures)} failed saves, then those of the last checkpoints succeed")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_whose_last_save_fails_reports_it_and_resumes_later(background, root, pretrained):
    """And while it runs, a second job in its folder is refused."""
    job = Job([*PRETRAIN, *SHORT, f"train.async_save={background}"], root, f"last-{background}")
    checkpoints, ballast = job.folder / "checkpoints", job.folder / "checkpoints" / "ballast"
    with small_disk(checkpoints):
        with launched(job) as launcher:
            wait_until(lambda: job.saved >= 2 * INTERVAL, launcher)
            with suspended(job, launcher):  # the run would otherwise be over before the second has started
                second = run_alone(job)
            assert second.returncode == ExitCode.BAD_CONFIG
            assert "two jobs cannot write to one run" in second.stderr and "Traceback" not in second.stderr
            fill(ballast)
            assert end_of(job, launcher) != 0
        assert "megatron-r1: cannot write to" in job.log
        for _, checkpoint in step_folders(checkpoints):
            verify(checkpoint)
        assert len(step_folders(checkpoints)) >= 2
        os.unlink(ballast)
        with launched(job) as launcher:
            assert end_of(job, launcher) == 0, job.log
        assert comparable(job.rows) == pretrained
