"""What this machine's environment runs on a GPU: packages, the compiler of kernels, Transformer Engine."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support.gpus import needs_gpus, needs_real_gpu

pytestmark = [*needs_gpus(), needs_real_gpu]
PACKAGES = ("transformer_engine.pytorch", "deep_ep", "sgl_kernel", "flash_mla", "deep_gemm", "flashinfer")
KERNEL = """
__global__ void fill(int* x) { x[threadIdx.x] = threadIdx.x; }
extern "C" int filled() {
    int *there, here[64], sum = 0;
    if (cudaMalloc(&there, sizeof here)) return -1;
    fill<<<1, 64>>>(there);
    if (cudaMemcpy(here, there, sizeof here, cudaMemcpyDeviceToHost)) return -2;
    for (int x : here) sum += x;
    return sum;
}
"""


def test_doctor_finds_cuda_with_transformer_engine(record_property):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", "doctor", "platform=cuda"], capture_output=True, text=True, timeout=200
    )
    record_property("doctor", done.stdout)
    assert done.returncode == 0, done.stderr
    assert "cuda, nccl, Transformer Engine" in " ".join(done.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_after_the_platform_is_chosen(package):
    if not importlib.util.find_spec(package.partition(".")[0]):
        pytest.skip(f"{package} is not installed")
    statement = f"from megatron_r1.platform import select; select('cuda'); import {package}"
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_compiler_of_kernels_makes_what_this_gpu_runs(tmp_path, monkeypatch):
    from megatron_r1.platform.cuda import take_cuda_from_packages

    monkeypatch.setattr(os, "environ", dict(os.environ))
    take_cuda_from_packages()
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    source, library = tmp_path / "fill.cu", tmp_path / "fill.so"
    source.write_text(KERNEL)
    options = ["-shared", "-Xcompiler", "-fPIC", "-arch=native", f"-L{home}/lib64", "-lcudart"]
    done = subprocess.run(
        [f"{home}/bin/nvcc", *options, str(source), "-o", str(library)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(library)).filled() == sum(range(64))
