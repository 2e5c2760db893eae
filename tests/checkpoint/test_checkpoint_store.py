"""A checkpoint is whole or not there: whatever kills, fills up or damages, the newest verified one is found."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, FileRecord, read_manifest, verify
from megatron_r1.checkpoint.store import CheckpointStore, SaveFailed, newest_verified, step_folders
from megatron_r1.errors import CheckpointDamaged, FolderInUse
from megatron_r1.files import hold
from tests.support.thread_ranks import ThreadRanks, on_two_ranks


def write(value: str, shards: int = 2):
    def write_shards(folder: Path) -> None:
        for shard in range(shards):
            (folder / f"shard-{shard}").write_text(value * 1000)

    return write_shards


def steps(folder: Path) -> list[int]:
    return [step for step, _ in step_folders(folder)]


def damage(checkpoint: Path) -> None:
    raw = bytearray((checkpoint / "shard-0").read_bytes())
    raw[3] ^= 1
    (checkpoint / "shard-0").write_bytes(raw)


def test_commit_then_newest_verified(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert store.newest_verified() is None
        path = store.commit(200, write("a"), {"seed": 1})
        assert path == tmp_path / "checkpoints" / "step-00000200"
        assert store.newest_verified() == (path, verify(path))
        assert verify(path).metadata == {"seed": 1, "step": 200}
        assert sorted(entry.name for entry in store.folder.iterdir()) == [".lock", "step-00000200"]


def test_files_are_on_disk_before_the_rename_and_the_rename_before_the_end(tmp_path: Path, monkeypatch) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    with CheckpointStore(tmp_path) as store:
        store.commit(1, write("a"), {})
    assert sorted(events[:2]) == [("fsync", "shard-0"), ("fsync", "shard-1")]
    assert events[2:] == [
        ("fsync", MANIFEST_NAME),
        ("fsync", "step-00000001.tmp"),
        ("rename", "step-00000001"),
        ("fsync", tmp_path.name),
    ]


def test_fallback_to_an_older_one_is_logged(tmp_path: Path, caplog) -> None:
    with CheckpointStore(tmp_path) as store:
        good = store.commit(1, write("a"), {})
        bad = store.commit(2, write("b"), {})
        damage(bad)
        found = store.newest_verified()
    assert found is not None and found[0] == good
    assert "step-00000002: shard-0 has digest" in caplog.text
    assert f"falling back to {good}" in caplog.text


def test_none_verifies(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            damage(store.commit(step, write("a"), {}))
        with pytest.raises(CheckpointDamaged, match="step-00000002: shard-0 .* no other checkpoint") as raised:
            store.newest_verified()
    assert raised.value.exit_code == 88


def test_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        good = store.commit(1, write("a"), {})
        (tmp_path / "step-00000009").mkdir()
        (tmp_path / "step-00000009" / "shard-0").write_text("a")
        found = store.newest_verified()
    assert found is not None and found[0] == good


def test_prune_counts_only_verified_ones(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        for step in range(1, 6):
            store.commit(step, write("a"), {})
    damage(tmp_path / "step-00000004")
    with CheckpointStore(tmp_path) as store:
        store.prune()
        assert steps(tmp_path) == [5, 4, 3]
        store.prune()
        assert steps(tmp_path) == [5, 4, 3]
        store.commit(6, write("a"), {})
        store.prune()
        assert steps(tmp_path) == [6, 5]


def test_unwanted_ones_are_removed_though_another_command_reads_them(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2, 3):
            store.commit(step, write(str(step)), {"undone": step > 1})
        damage(store.path(3))
        (store.path(3) / MANIFEST_NAME).write_text("{}")
        with hold(store.path(2) / MANIFEST_NAME):
            store.discard(lambda manifest: manifest.metadata["undone"])
        assert steps(tmp_path) == [3, 1]
        assert store.newest_verified()[0] == store.path(1)


def test_prune_removes_links_not_what_they_point_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        path = store.commit(2, write("a"), {})
        (path / "link").symlink_to(outside, target_is_directory=True)
        (store.folder / "step-00000001").symlink_to(outside, target_is_directory=True)
        for step in (3, 4, 5):
            store.commit(step, write("a"), {})
        store.prune()
        assert steps(store.folder) == [5, 4]
    assert (outside / "precious").exists()


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.commit(1, write("a"), {})
        path = store.commit(1, write("b"), {"again": True})
        assert (path / "shard-0").read_text() == "b" * 1000
        assert verify(path).metadata["again"]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "step-00000001"]


def test_second_job_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    holder = "import sys, pathlib\nfrom megatron_r1.checkpoint.store import CheckpointStore\n"
    holder += "store = CheckpointStore(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()\n"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=f"pid {other.pid}: two jobs") as raised:
            CheckpointStore(tmp_path)
        assert raised.value.exit_code == 2
        other.kill()
    with CheckpointStore(tmp_path) as store:
        store.commit(1, write("a"), {})
        assert newest_verified(tmp_path) is not None, "a reader needs no lock"


FAILING = """
import os, shutil, sys
from pathlib import Path
from megatron_r1.checkpoint.store import CheckpointStore
import megatron_r1.checkpoint.store as module

folder, point = Path(sys.argv[1]), sys.argv[2]

def die(*_):
    os._exit(9)

def dying_before(function):
    return lambda *arguments: die()

def dying_after(function):
    return lambda *arguments: (function(*arguments), die())

class Store(CheckpointStore):
    pass

def write(value):
    def shards(path):
        (path / "shard-0").write_text(value * 1000)
        if value == "new" and point == "mid_shard":
            with (path / "shard-1").open("w") as file:
                file.write(value * 500)
                file.flush()
                die()
        (path / "shard-1").write_text(value * 1000)
    return shards

store = Store(folder)
for step in (1, 2):
    store.commit(step, write("old"), {})
if point == "before_write":
    Store._prepare = dying_after(Store._prepare)
elif point == "before_manifest":
    module.write_manifest = dying_before(module.write_manifest)
elif point == "before_rename":
    Store._publish = dying_before(Store._publish)
elif point == "before_last_fsync":
    Path.rename = dying_after(Path.rename)
elif point == "between_the_renames_of_a_replacement":
    Path.rename = dying_after(Path.rename)
store.commit(2 if "replacement" in point else 3, write("new"), {})
if point == "prune_before_rename":
    Store._discard = dying_before(Store._discard)
elif point == "mid_prune":
    shutil.rmtree = lambda path: (next(path.glob("shard-*")).unlink(), die())
store.prune()
os._exit(1)
"""

SURVIVORS = {
    "before_write": [2, 1],
    "mid_shard": [2, 1],
    "before_manifest": [2, 1],
    "before_rename": [2, 1],
    "before_last_fsync": [3, 2, 1],
    "between_the_renames_of_a_replacement": [2, 1],
    "prune_before_rename": [3, 2, 1],
    "mid_prune": [3, 2],
}


@pytest.mark.parametrize("point", SURVIVORS)
def test_death_at_any_point_leaves_whole_checkpoints(tmp_path: Path, point: str) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path), point], timeout=30, check=False)
    assert done.returncode == 9, "the child did not die where it was told to"
    with CheckpointStore(tmp_path) as store:
        assert steps(tmp_path) == SURVIVORS[point]
        for _, path in step_folders(tmp_path):
            verify(path)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
            [".lock", *(path.name for _, path in step_folders(tmp_path))]
        )
        store.commit(4, write("after"), {})
        store.prune()
        assert steps(tmp_path) == [4, SURVIVORS[point][0]]


def test_failed_write_leaves_nothing_and_can_be_survived(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "shard-0").write_text("partial")
        raise OSError(28, "No space left on device")

    with CheckpointStore(tmp_path) as store:
        good = store.commit(1, write("a"), {})
        with pytest.raises(SaveFailed, match="No space left on device"):
            store.commit(2, fail, {})
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "step-00000001"]
        assert verify(good)
        store.commit(2, write("b"), {})
        assert steps(tmp_path) == [2, 1]


def test_failed_publication_leaves_the_old_checkpoint_of_that_step(tmp_path: Path, monkeypatch) -> None:
    with CheckpointStore(tmp_path) as store:
        path = store.commit(1, write("a"), {})
        rename = Path.rename

        def failing_rename(source: Path, target: Path) -> Path:
            if source.suffix == ".tmp":
                raise OSError(5, "Input/output error")
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", failing_rename)
        with pytest.raises(SaveFailed, match="Input/output error"):
            store.commit(1, write("b"), {})
        assert (path / "shard-0").read_text() == "a" * 1000
        assert verify(path)


def test_full_disk(tmp_path: Path) -> None:
    """A real one: a file system of 256 kB, for which it takes root."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with CheckpointStore(tmp_path) as store:
            store.commit(1, write("a", shards=50), {})
            with pytest.raises(SaveFailed, match="No space left on device"):
                store.commit(2, write("b", shards=50), {})
            found = store.newest_verified()
            assert found is not None and found[0].name == "step-00000001"
            assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "step-00000001"]
            store.commit(3, write("c", shards=5), {})
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_one_rank_fails_and_all_raise(tmp_path: Path, failing_rank: int) -> None:
    def job(ranks: ThreadRanks) -> list[Any]:
        def shard(folder: Path) -> None:
            (folder / f"shard-{ranks.rank}").write_text("x" * 100)

        def broken_shard(folder: Path) -> None:
            shard(folder)
            if ranks.rank == failing_rank:
                raise RuntimeError("bad sector")

        with CheckpointStore(tmp_path, ranks=ranks) as store:
            store.commit(1, shard, {})
            try:
                store.commit(2, broken_shard, {})
                failure = ""
            except SaveFailed as error:
                failure = str(error)
            found = store.newest_verified()
            store.commit(3, shard, {})
            store.prune()
            return [failure, found]

    first, second = on_two_ranks(job)
    assert first == second
    assert f"RuntimeError: bad sector on rank {failing_rank}" in first[0]
    assert first[1][0].name == "step-00000001"
    assert steps(tmp_path) == [3, 1]
    assert set(verify(tmp_path / "step-00000003").files) == {"shard-0", "shard-1"}


@pytest.mark.parametrize("shard", [0, 1])
def test_damage_that_one_rank_finds_sends_all_to_the_older_one(tmp_path: Path, shard: int) -> None:
    """Two files of one size: each rank hashes one of them."""

    def job(ranks: ThreadRanks) -> tuple[str, str]:
        def shards(folder: Path) -> None:
            (folder / f"shard-{ranks.rank}").write_text("x" * 100)

        with CheckpointStore(tmp_path, ranks=ranks) as store:
            store.commit(1, shards, {})
            store.commit(2, shards, {})
        ranks.barrier.wait(timeout=10)
        if ranks.rank == 0:
            (tmp_path / "step-00000002" / f"shard-{shard}").write_text("y" * 100)
        ranks.barrier.wait(timeout=10)
        with CheckpointStore(tmp_path, ranks=ranks) as store:
            found = store.newest_verified()
        assert found
        return found[0].name, found[1].files[f"shard-{shard}"].digest

    first, second = on_two_ranks(job)
    assert first == second and first[0] == "step-00000001"


def test_files_that_their_writers_hashed_are_not_read_again(tmp_path: Path) -> None:
    """A disk that changes what was written is noticed by who reads it."""
    record = FileRecord(4, hashlib.sha256(b"told").hexdigest())

    def lied_to(folder: Path) -> dict[str, FileRecord]:
        (folder / "file").write_bytes(b"tolD")
        (folder / "other").write_bytes(b"other")
        return {"file": record}

    with CheckpointStore(tmp_path) as store:
        store.commit(1, write("a"), {})
        store.commit(2, lied_to, {})
        assert read_manifest(store.path(2)).files["file"] == record
        found = store.newest_verified()
        assert found and found[0] == store.path(1)


@pytest.mark.parametrize("content", [b"shorter", None])
def test_a_file_that_differs_from_its_record_fails_the_save(tmp_path: Path, content: bytes | None) -> None:
    def torn(folder: Path) -> dict[str, FileRecord]:
        if content:
            (folder / "file").write_bytes(content)
        return {"file": FileRecord(100, "0" * 64)}

    with (
        CheckpointStore(tmp_path) as store,
        pytest.raises(SaveFailed, match="step-00000001.tmp/file: 100 bytes were written"),
    ):
        store.commit(1, torn, {})


def test_a_second_save_must_wait_for_the_first(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.begin(1, write("a"), {}, background=True)
        with pytest.raises(ValueError, match="step 1 is still being saved"):
            store.begin(2, write("b"), {})
        store.settle()
        assert steps(tmp_path) == [1] and not store.saving
