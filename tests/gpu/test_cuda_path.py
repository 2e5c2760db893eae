"""The CUDA path on a real GPU: skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_r1.runs.initial_weights import find_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    command = [sys.executable, "-m", "megatron_r1", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pre_training_learns_on_cuda(tmp_path, precision):
    done = run(
        *("pretrain", f"root='{tmp_path}'", "name=gpu", "platform=cuda", f"model.dtype={precision}"),
        *("data.num_documents=2000", "train.steps=60", "train.schedule.warmup_steps=5", "track=off"),
    )
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 60 and losses[-1] < 0.6 * losses[0]


@pytest.mark.timeout(700)
def test_pre_training_learns_in_fp8(tmp_path):
    """Transformer Engine's blockwise recipe, on Hopper or later; losses are those of bf16 within a few per cent."""
    pytest.importorskip("transformer_engine", reason="FP8 on CUDA is Transformer Engine's")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("FP8 block scaling needs a GPU of compute capability 9.0")
    from megatron_r1.model.fp8.apply import TRANSFORMER_ENGINE

    losses = {}
    for precision in ("off", "deepseek"):
        done = run(
            *("pretrain", f"root='{tmp_path}'", f"name={precision}", "platform=cuda", "model.dtype=bf16"),
            *("model.hidden_size=256", "model.ffn_hidden_size=512", "model.moe.ffn_hidden_size=128", "track=off"),
            *("model.attention.q_lora_rank=128", "model.attention.kv_lora_rank=128", f"fp8={precision}"),
            *("model.attention.qk_nope_head_dim=64", "model.attention.qk_rope_head_dim=64"),
            *("model.attention.v_head_dim=64", "data.num_documents=2000", "train.steps=60"),
            "train.schedule.warmup_steps=5",
        )
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(row)["train/loss"] for row in rows]
    plan = json.loads((tmp_path / "deepseek" / "precision.json").read_text())
    assert "mtp.layers.0.eh_proj" in plan["high"] and set(plan["quantised"].values()) == {TRANSFORMER_ENGINE}
    assert losses["off"] != losses["deepseek"]
    assert losses["deepseek"][-1] == pytest.approx(losses["off"][-1], rel=0.05)


@pytest.mark.timeout(700)
def test_a_cuda_run_starts_with_the_losses_of_a_cpu_run(tmp_path):
    losses = {}
    for platform in ("cpu", "cuda"):
        done = run(
            *("pretrain", f"root='{tmp_path}'", f"name={platform}", f"platform={platform}"),
            *("data.num_documents=2000", "train.steps=3", "train.schedule.warmup_steps=1", "track=off"),
        )
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / platform / "metrics.jsonl").read_text().splitlines()
        losses[platform] = [json.loads(row)["train/loss"] for row in rows]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.timeout(700)
def test_the_moving_average_on_cuda_is_that_of_the_steps_weights(tmp_path):
    """A decay of nearly 0 leaves the last weights, whatever the thread and the device had under way."""
    done = run(
        *("pretrain", f"root='{tmp_path}'", "name=gpu", "platform=cuda", "train.ema_decay=1e-9", "track=off"),
        *("data.num_documents=2000", "train.steps=20", "train.schedule.warmup_steps=5"),
    )
    assert done.returncode == 0, done.stderr
    model, ema = (find_weights(str(tmp_path / "gpu"), which=which).tensors for which in ("model", "ema"))
    assert model.keys() == ema.keys()
    for name, tensor in model.items():
        torch.testing.assert_close(ema[name], tensor.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.timeout(1400)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_fine_tuning_learns_as_unpacked_on_cuda(tmp_path, precision):
    common = (f"root='{tmp_path}'", "platform=cuda", f"model.dtype={precision}", "track=off")
    done = run("pretrain", *common, "name=base", "data.num_documents=2000", "train.steps=60")
    assert done.returncode == 0, done.stderr
    losses = {}
    for packing in ("best_fit", "none"):
        chosen = (f"name={packing}", f"sft.packing={packing}", "sft.num_conversations=400")
        done = run("sft", *common, *chosen, f"init.from='{tmp_path / 'base'}'")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / packing / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["eval/loss"] < 0.8 * rows[0]["eval/loss_before"]
        losses[packing] = rows[0]["eval/loss_before"]
    # The same weights on the same examples, packed and each alone; Transformer Engine multiplies fp32 in TF32.
    assert losses["best_fit"] == pytest.approx(losses["none"], rel=1e-3 if precision == "fp32" else 1e-2)
