"""What doctor says of the driver, of the compiler of kernels, and of NVIDIA's Apex."""

from __future__ import annotations

import pytest

from megatron_r1.commands import doctor
from megatron_r1.runs.provenance import attempt_facts


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of a machine that has nothing else; they print a line."""

    def write(name: str, line: str) -> None:
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{line}'\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return write


def test_the_driver_is_named_by_its_version(programs):
    assert "580 or newer" in doctor._driver()
    programs("nvidia-smi", "580.95.05")
    assert doctor._driver() == "580.95.05"


def test_the_compiler_of_kernels_is_named_by_its_release(programs, tmp_path):
    assert "does not run" in doctor._compiler()
    programs("bin/nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    assert doctor._compiler() == f"{tmp_path}/bin/nvcc, release 13.0"


def test_apex_is_named_by_its_extensions_and_recorded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert "not installed" in doctor._apex() and attempt_facts()[0]["apex"] == []
    for name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)  # forgets what it did not find
    assert doctor._apex() == "amp_C, fused_weight_gradient_mlp_cuda"
    assert attempt_facts()[0]["apex"] == ["amp_C", "fused_weight_gradient_mlp_cuda"]
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "another project" in doctor._apex()
