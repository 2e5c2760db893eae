"""A run whose servers all die: status 87, with a checkpoint from which it goes on, whoever had the memory last."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.checkpoint.store import step_folders
from megatron_r1.config.keys import only_read
from megatron_r1.errors import ExitCode
from megatron_r1.track.record import read_metrics
from tests.support.recorded import unregistered

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(240)]
COMMON = [
    "platform=cpu", "threads=1", "track=off", "data.num_documents=2000", "model.num_layers=2",
    "train.schedule.warmup_steps=2",
]  # fmt: skip
PRETRAIN = ["train.steps=4", "train.sequence_length=64", "train.global_batch_size=2", "train.micro_batch_size=2"]
GRPO = [
    "train.steps=1000", "train.save_interval=1000", "rollout.max_response_tokens=16",
    "rollout.sglang.servers=1", "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
    "rollout.sglang.pool.restarts=0", "rl.prompts_per_rollout=2", "rl.group_size=4", "rl.updates_per_rollout=2",
]  # fmt: skip


def command(verb: str, root: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_r1",
        verb,
        *only_read(verb, COMMON),
        f"root='{root}'",
        *arguments,
    ]


def servers_of(process: psutil.Process) -> list[psutil.Process]:
    """A server's own processes have other names."""
    below = process.children(recursive=True)
    return [one for one in below if "megatron_r1.rollout.sglang.servers.launch" in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    subprocess.run(command("pretrain", root, "name=base", *PRETRAIN), check=True, timeout=100, capture_output=True)
    return root / "base"


@pytest.mark.parametrize(
    "placement",
    [(), pytest.param(("rollout.placement=colocated", "rollout.weight_sync.method=ipc"), marks=pytest.mark.slow)],
)
def test_all_servers_dead_is_status_87_with_a_checkpoint(base, tmp_path, placement):
    run, log = tmp_path / "zero", tmp_path / "log"
    arguments = command("grpo", tmp_path, "name=zero", f"init.from='{base}'", *GRPO, *placement)
    with open(log, "w") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not ((run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= 2):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        servers = servers_of(psutil.Process(process.pid))
        assert len(servers) == 1
        for server in servers:
            os.killpg(server.pid, signal.SIGKILL)
        assert process.wait(60) == ExitCode.NO_ROLLOUT_CAPACITY, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "ended with status -9" in log.read_text().splitlines()[-1]
    rows = read_metrics(run / "metrics.jsonl")
    assert unregistered(rows, "grpo") == []
    (step, folder), *others = step_folders(run / "checkpoints")
    state = json.loads((folder / "state.json").read_text())
    assert not others and step == state["step"] == rows[-1]["step"] >= 2
    assert state["data_position"] == 2 * step
    assert not [one for one in psutil.process_iter() if one.ppid() == process.pid]
