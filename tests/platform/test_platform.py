"""Which platform is chosen, and what the CPU adapter answers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_r1.errors import ExitCode, PlatformError
from megatron_r1.platform import Platform, cpu, select

needs_no_gpu = pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")


def test_auto_is_refused_inside_a_slurm_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(PlatformError, match="platform=auto.*cuda or cpu") as refused:
        select("auto")
    assert refused.value.exit_code == ExitCode.BAD_CONFIG
    assert select("cpu").name == "cpu"


@needs_no_gpu
def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    platform = select("auto")
    assert platform == Platform("cpu", "gloo", transformer_engine=False) and platform.device == "cpu"


@needs_no_gpu
def test_a_gpu_with_a_broken_driver_is_an_error_and_no_cpu_run(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for requested in ("auto", "cuda"):
        with pytest.raises(PlatformError, match="no usable GPU"):
            select(requested)


def test_a_rank_names_its_own_gpu(monkeypatch):
    for name, value in (("WORLD_SIZE", 8), ("RANK", 7), ("LOCAL_WORLD_SIZE", 4), ("LOCAL_RANK", 3)):
        monkeypatch.setenv(name, str(value))
    assert Platform("cuda", "nccl", transformer_engine=True).device == "cuda:3"


def test_preparing_again_changes_nothing():
    cpu.prepare()
    names = ("empty", "zeros", "tensor", "randn")
    before = [getattr(torch, name) for name in names], torch.Tensor.to, torch.Tensor.type, torch.cuda.current_stream
    exchange = torch.distributed.all_to_all_single
    cpu.prepare()
    assert before == (
        [getattr(torch, name) for name in names], torch.Tensor.to, torch.Tensor.type, torch.cuda.current_stream
    )  # fmt: skip
    assert torch.distributed.all_to_all_single is exchange


def test_cuda_questions_are_answered_for_the_cpu():
    cpu.prepare()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).to("cuda:0").device.type == "cpu" and torch.ones(2).to(device="cuda").device.type == "cpu"
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).type(torch.int64).dtype == torch.int64
    assert torch.cuda.current_device() == torch.device("cpu") and not torch.cuda.is_available()
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_device_context_still_decides():
    cpu.prepare()
    with torch.device("meta"):
        assert {torch.empty(2).device.type, torch.arange(2).device.type, torch.ones(2).device.type} == {"meta"}


@pytest.mark.parametrize(
    ("package", "error"),
    [
        ("flash_mla", "OSError('libcuda.so.1')"),
        ("transformer_engine", "FileNotFoundError('Could not find shared object file')"),
        ("deep_ep", "AssertionError"),
    ],
)
def test_packages_for_gpus_are_hidden_where_there_is_none(tmp_path, monkeypatch, one_rank, package, error):
    """Importing them without a driver or a compiled extension is an error that megatron-core does not expect."""
    (tmp_path / f"{package}.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError):
        importlib.import_module(package)


def test_training_starts_without_the_compiler_and_wandb():
    """Importing them takes as long as the rest; whoever wants them later has the real ones."""
    statement = (
        "import json, sys; from megatron_r1.platform import select; select('cpu'); import megatron_r1.commands.grpo; "
        "slow = [name for name in ('torch._inductor', 'wandb', 'reasoning_gym', 'matplotlib') if name in sys.modules]; "
        "import torch, wandb; "
        "doubled = torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(2)); "
        "print(json.dumps([slow, hasattr(wandb, 'init'), doubled.tolist()]))"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", statement], capture_output=True, text=True, timeout=100)
    assert json.loads(run.stdout.splitlines()[-1]) == [[], True, [2.0, 2.0]], run.stderr


def test_recomputed_activations_need_no_compiler(one_rank, monkeypatch):
    """megatron-core frees an output, and fills its storage again for the views that the backward pass reads."""
    from megatron.core.tensor_parallel import random

    def compiled(**_):
        raise AssertionError("megatron-core compiles C++")

    monkeypatch.setattr(random, "load_inline", compiled)
    x_TD = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    recomputed = random.CheckpointWithoutOutput(fp8=None)
    tanh_TD = recomputed.checkpoint(torch.tanh, x_TD)
    squares_N = tanh_TD.view(-1).square()
    recomputed.discard_output_and_register_recompute(squares_N)
    assert tanh_TD.untyped_storage().nbytes() == 0
    squares_N.sum().backward()
    tanh = x_TD.detach().tanh()
    torch.testing.assert_close(x_TD.grad, 2 * tanh * (1 - tanh**2), rtol=1e-14, atol=1e-15)


def test_one_rank_reduces_nothing(one_rank):
    """gloo would refuse a tensor without memory."""
    nothing = torch.empty(2, device="meta")
    assert torch.distributed.all_reduce(nothing) is None
    assert torch.distributed.broadcast(nothing, src=0) is None
    assert torch.distributed.all_reduce(nothing, async_op=True).wait()
