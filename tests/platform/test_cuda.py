"""What a process on CUDA prepares before megatron-core is imported; the GPU is played, packages are stand-ins."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.errors import ConfigError, PlatformError
from megatron_r1.platform import cuda
from megatron_r1.platform.kernels import apex_extensions, refuse_missing_kernels

STAND_INS = ("transformer_engine", "deep_ep", "nvidia", "amp_C", "fused_weight_gradient_mlp_cuda")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Puts a package of the given files first; this process forgets it afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in STAND_INS]:
            monkeypatch.delitem(sys.modules, name)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in STAND_INS]:
        del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for variable in ("CUDA_HOME", "CUDNN_HOME", "NVRTC_HOME", "CURAND_HOME"):
        monkeypatch.setenv(variable, "mine")


@pytest.mark.parametrize(
    "broken",
    [
        "raise FileNotFoundError('Could not find shared object file for Transformer Engine torch lib.')",
        "raise AssertionError('version mismatch')",
        "raise OSError('libcublas.so.13: cannot open shared object file')",
        "import a_module_that_is_missing",
    ],
)
def test_a_transformer_engine_that_cannot_be_imported_is_one_line(packages, gpu, broken):
    packages({"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": broken})
    with pytest.raises(PlatformError, match="installed but cannot be imported .*launch/setup.sh") as refused:
        cuda.prepare()
    assert "\n" not in str(refused.value)


def test_transformer_engine_builds_the_model_where_it_can_be_imported(packages, gpu):
    packages({"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""})
    assert cuda.prepare() is True


def test_torch_modules_build_the_model_where_there_is_no_transformer_engine(packages, gpu):
    assert cuda.prepare() is False


DEEP_EP = {
    "deep_ep/__init__.py": "from .buffers import Buffer\nfrom .utils.event import EventHandle, EventOverlap",
    "deep_ep/buffers.py": "class Buffer: pass",
    "deep_ep/utils/__init__.py": "from .event import EventHandle",
    "deep_ep/utils/event.py": "class EventHandle: pass\nclass EventOverlap: pass",
}
"""The names of DeepEP 2.1, and where they are."""


def dispatcher_of_megatron_core():
    """Its module again, as one that imports DeepEP now."""
    path = Path(importlib.util.find_spec("megatron.core").origin).parent / "transformer/moe/fused_a2a.py"
    spec = importlib.util.spec_from_file_location("fused_a2a_again", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_megatron_core_finds_the_names_of_deep_ep(packages, gpu, one_rank):
    packages(DEEP_EP)
    assert not dispatcher_of_megatron_core().HAVE_DEEP_EP
    cuda.prepare()
    assert dispatcher_of_megatron_core().HAVE_DEEP_EP
    refuse_missing_kernels(PerformanceConfig(moe_token_dispatcher_type="deepep"))


@pytest.mark.parametrize("error", ["AssertionError", "OSError('libnvshmem')", "ImportError"])
def test_a_deep_ep_that_cannot_be_imported_is_refused_where_it_is_asked_for(packages, gpu, one_rank, caplog, error):
    packages({"deep_ep/__init__.py": f"raise {error}"})
    cuda.prepare()
    assert error.partition("(")[0] in caplog.text
    assert not dispatcher_of_megatron_core().HAVE_DEEP_EP
    with pytest.raises(ConfigError, match="dispatcher_type=deepep: needs the package deep_ep"):
        refuse_missing_kernels(PerformanceConfig(moe_token_dispatcher_type="deepep"))


def test_the_hybrid_dispatcher_needs_its_own_branch_of_deep_ep(packages, gpu):
    packages(DEEP_EP)
    cuda.prepare()
    with pytest.raises(ConfigError, match="dispatcher_type=hybridep: needs DeepEP's branch"):
        refuse_missing_kernels(PerformanceConfig(moe_token_dispatcher_type="hybridep"))
    setattr(sys.modules["deep_ep"], "HybridEPBuffer", object)  # noqa: B010
    refuse_missing_kernels(PerformanceConfig(moe_token_dispatcher_type="hybridep"))


def test_gradient_accumulation_fusion_needs_apex(packages):
    fused = PerformanceConfig(gradient_accumulation_fusion=True)
    with pytest.raises(ConfigError, match="gradient_accumulation_fusion=True: needs NVIDIA Apex"):
        refuse_missing_kernels(fused)
    packages({"fused_weight_gradient_mlp_cuda.py": ""})
    refuse_missing_kernels(fused)
    assert apex_extensions() == ["fused_weight_gradient_mlp_cuda"]


def test_nothing_is_refused_that_needs_nothing(packages):
    refuse_missing_kernels(PerformanceConfig())


def test_kernels_and_transformer_engine_take_cuda_from_this_environment(packages, monkeypatch, tmp_path):
    """A toolkit of the machine may be of another version; what the user has set stays."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(os, "environ", {"CUDNN_HOME": "mine"})
    packages(
        {
            "nvidia/cu13/bin/nvcc": "",
            "nvidia/cu13/lib/libnvrtc.so.13": "",
            "nvidia/cu13/lib/libcurand.so.10": "",
            "nvidia/cudnn/lib/libcudnn.so.9": "",
        }
    )
    sys.path_importer_cache.clear()
    cuda.take_cuda_from_packages()
    cu13 = str(tmp_path / "nvidia/cu13")
    assert os.environ == {"CUDA_HOME": cu13, "NVRTC_HOME": cu13, "CURAND_HOME": cu13, "CUDNN_HOME": "mine"}


def test_no_variable_names_what_is_not_there(packages, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cuda.take_cuda_from_packages()
    assert os.environ == {}
