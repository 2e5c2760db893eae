"""A trainer and a server on one real GPU, in turns: skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_r1.config.keys import only_read
from megatron_r1.train.offload import Offloaded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
COMMON = [
    "platform=cuda", "track=off", "seed=3", "data.num_documents=2000", "model.num_layers=2", "model.dtype=bf16",
    "train.schedule.warmup_steps=2",
    # What FlashAttention's and FlashMLA's kernels serve.
    "model.attention.kv_lora_rank=512", "model.attention.qk_rope_head_dim=64",
]  # fmt: skip
GRPO = [
    "rollout.max_response_tokens=24", "rl.prompts_per_rollout=4", "rl.group_size=4", "rl.updates_per_rollout=2",
    "rollout.placement=colocated", "rollout.sglang.server.memory_saver=true",
    "rollout.sglang.server.memory_fraction=0.3",
]  # fmt: skip


def test_what_leaves_a_gpu_frees_it_and_comes_back():
    device = torch.device("cuda", torch.cuda.current_device())
    base = torch.randn(64 << 20, device=device)
    view, before, held = base[1000:2000], base.cpu(), torch.cuda.memory_allocated(device)
    reserved = torch.cuda.memory_reserved(device)
    moved = Offloaded(device, lambda: [view])
    for _ in range(2):  # the second time into the host memory of the first
        moved.offload()
        assert held - torch.cuda.memory_allocated(device) >= base.nbytes
        assert reserved - torch.cuda.memory_reserved(device) >= base.nbytes
        moved.onload()
        assert torch.equal(base.cpu(), before) and torch.equal(view.cpu(), before[1000:2000])


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("sync", ["ipc", "group", "disk"])
def test_reinforcement_in_turns_on_one_gpu(tmp_path, sync):
    pytest.importorskip("torch_memory_saver", reason="SGLang gives memory back by torch_memory_saver")
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}

    def run(*arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "megatron_r1",
            *arguments,
            *only_read(arguments[0], COMMON),
            f"root='{tmp_path}'",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    run("pretrain", "name=base", "train.steps=300")
    base = [json.loads(row)["train/loss"] for row in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    assert base[-1] < 0.5 * base[0], "nearly uniform distributions hide wrong weights"
    run(
        "grpo",
        "name=zero",
        *GRPO,
        f"rollout.weight_sync.method={sync}",
        f"init.from='{tmp_path / 'base'}'",
        "train.steps=5",
    )
    rows = [json.loads(line) for line in (tmp_path / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/staleness_max"] for row in rows] == [0] * 5
    assert max(row["mismatch/logprob_max_abs"] for row in rows) < 0.3, "the server does not have the trainer's weights"
