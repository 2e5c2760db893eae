"""Saves in the background: one at a time, settled between steps, and a failed one is survived unless it is the last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_r1.checkpoint.manifest import verify
from megatron_r1.checkpoint.store import CheckpointStore, SaveFailed, step_folders
from megatron_r1.train.hooks.checkpoint import CheckpointHook
from megatron_r1.train.state import TrainState


class Disk:
    """Writes one file per checkpoint, with a configurable delay and errors."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.ready.set()
        self.broken = False
        self.at_once = self.most_at_once = 0

    def snapshot(self, state: TrainState) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                (folder / "file").write_text(f"step {state.step}")
                assert self.ready.wait(timeout=20)
                if self.broken:
                    raise OSError(28, "No space left on device")
            finally:
                self.at_once -= 1

        return write


def steps(folder: Path) -> list[int]:
    return [step for step, _ in step_folders(folder)]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def store(tmp_path: Path, disk: Disk):
    with CheckpointStore(tmp_path) as store:
        yield store
        disk.ready.set()


def hook(store: CheckpointStore, disk: Disk, background: bool = True) -> CheckpointHook:
    return CheckpointHook(store, disk.snapshot, {}, 2, 0, background)


def wait_until_written(store: CheckpointStore) -> None:
    deadline = time.monotonic() + 20
    while not store.written():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def after(hook: CheckpointHook, *steps: int) -> None:
    for step in steps:
        hook.after_step(TrainState(step=step), {})


def test_training_continues_while_a_checkpoint_is_written(store, disk):
    checkpoints = hook(store, disk)
    disk.ready.clear()
    after(checkpoints, 1, 2, 3)
    assert store.saving and steps(store.folder) == []
    disk.ready.set()
    wait_until_written(store)
    after(checkpoints, 5)
    assert not store.saving and steps(store.folder) == [2]
    assert (store.path(2) / "file").read_text() == "step 2"
    assert verify(store.path(2)).metadata == {"step": 2}


def test_the_next_save_waits_for_the_one_before(store, disk):
    checkpoints = hook(store, disk)
    disk.ready.clear()
    after(checkpoints, 2, 3)
    timer = threading.Timer(0.2, disk.ready.set)
    timer.start()
    after(checkpoints, 4, 5, 6, 7)
    checkpoints.finish(TrainState(step=7))
    timer.join()
    assert disk.most_at_once == 1 and steps(store.folder) == [7, 6]
    assert not store.saving


def test_a_failed_save_is_survived_and_logged_with_its_step(store, disk, caplog):
    checkpoints = hook(store, disk)
    after(checkpoints, 2)
    wait_until_written(store)
    after(checkpoints, 3)
    disk.broken = True
    after(checkpoints, 4)
    wait_until_written(store)
    after(checkpoints, 5)
    assert "step 4: " in caplog.text and "No space left on device" in caplog.text
    assert steps(store.folder) == [2] and not list(store.folder.glob("*.tmp"))
    disk.broken = False
    after(checkpoints, 6)
    checkpoints.finish(TrainState(step=6))
    assert steps(store.folder) == [6, 2]


@pytest.mark.parametrize("background", [True, False])
def test_the_last_save_must_not_fail(store, disk, background):
    checkpoints = hook(store, disk, background)
    after(checkpoints, 2)
    if background:
        wait_until_written(store)
    disk.broken = True
    with pytest.raises(SaveFailed):
        checkpoints.finish(TrainState(step=3))
    assert steps(store.folder) == [2]


def test_a_failed_background_save_of_the_last_step_is_tried_again(store, disk):
    checkpoints = hook(store, disk)
    disk.broken = True
    after(checkpoints, 2)
    wait_until_written(store)
    disk.broken = False
    checkpoints.finish(TrainState(step=2))
    assert steps(store.folder) == [2]


def test_a_last_step_that_is_undone_is_not_saved(store, disk):
    checkpoints = CheckpointHook(store, disk.snapshot, {}, 2, 0, True, lambda: False)
    after(checkpoints, 2, 3)
    checkpoints.finish(TrainState(step=3))
    assert steps(store.folder) == [2] and not store.saving


def test_a_run_that_ends_badly_leaves_no_checkpoint_half_done(tmp_path, disk):
    disk.ready.clear()
    with pytest.raises(ZeroDivisionError), CheckpointStore(tmp_path) as store:
        after(hook(store, disk), 2)
        threading.Timer(0.1, disk.ready.set).start()
        raise ZeroDivisionError
    with CheckpointStore(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
