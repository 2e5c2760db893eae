"""Two real gloo ranks save into one store, fail together and find the same checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.checkpoint.manifest import verify
from megatron_r1.checkpoint.store import step_folders

JOB = """
import sys
from pathlib import Path
import torch.distributed as dist
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.checkpoint.store import CheckpointStore, SaveFailed

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)

def shard(path):
    (path / f"shard-{rank}").write_text("x" * 100)

def broken(path):
    shard(path)
    if rank == 1:
        raise OSError(28, "No space left on device")

with CheckpointStore(folder, ranks=AllRanks()) as store:
    store.commit(1, shard, {})
    try:
        store.commit(2, broken, {})
    except SaveFailed as error:
        print(error)
    print(store.newest_verified()[0].name)
dist.destroy_process_group()
"""


@pytest.mark.dist
def test_two_gloo_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(rank), folder, tmp_path / "rendezvous"], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    assert "No space left on device on rank 1" in outputs[0]
    assert outputs[0].endswith("step-00000001\n")
    assert [step for step, _ in step_folders(folder)] == [1]
    assert set(verify(folder / "step-00000001").files) == {"shard-0", "shard-1"}
