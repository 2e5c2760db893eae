"""Two nodes of a SLURM allocation: run inside one (salloc --nodes=2), from a folder that both see."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.test_several_gpus import MODEL, ROUNDING, STEPS, difference
from tests.support.gpus import losses, needs_real_gpu
from tests.support.launching import run_to_the_end

NODES = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
pytestmark = [
    pytest.mark.gpu,
    needs_real_gpu,
    pytest.mark.skipif(NODES < 2 or not shutil.which("srun"), reason="needs a SLURM allocation of two nodes"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder on the file system that the nodes share: the one that the allocation started in."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("SLURM_SUBMIT_DIR", "."), prefix="two-nodes-") as folder:
        yield Path(folder).resolve()


def pretrain(folder: Path, name: str, nodes: int, tasks: int, *settings: str) -> list[float]:
    launcher = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
    command = [*launcher, sys.executable, "-m", "megatron_r1", "pretrain", f"root='{folder}'", f"name={name}"]
    fixed = ["platform=cuda", "track=off", "data.num_documents=2000", "train.schedule.warmup_steps=2"]
    run_to_the_end([*command, *fixed, *MODEL, f"train.steps={STEPS}", *settings], 1200)
    return losses(folder / name)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("parallel.expert={ranks}",),
        ("parallel.pipeline=2",),
        ("parallel.expert={ranks}", "performance.moe_token_dispatcher_type=deepep"),
    ],
    ids=["data", "experts", "pipeline", "deepep"],
)
def test_two_nodes_learn_as_one_gpu_does(shared, record_property, request, settings):
    """What ranks exchange crosses the network; checkpoints and the run's lock are on the shared file system."""
    pytest.importorskip("deep_ep", reason="needs DeepEP") if "deepep" in request.node.callspec.id else None
    gpus = min(torch.cuda.device_count(), 4)
    expected = pretrain(shared, f"one-{request.node.callspec.id}", 1, 1)
    chosen = [setting.format(ranks=2 * gpus) for setting in settings]
    found = difference(pretrain(shared, request.node.callspec.id, 2, gpus, *chosen), expected)
    record_property("largest relative difference", f"{found:.1e}")
    assert found < ROUNDING
