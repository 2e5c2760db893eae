"""launch/setup.sh stops where a step fails; its packages are played by a Python that installs nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = r"""#!/usr/bin/env bash
echo "$*" >>pip.log
case "$*" in
    *"import torch, transformer_engine.pytorch"*) exit "${IMPORTS:-0}" ;;
    *"transformer_engine.pytorch"*) exit 1 ;; # its libraries need what torch loads
    *get_path*) echo "$PWD/include" ;;
    *gpu-build.txt*) exit "${BUILDS:-0}" ;;
    *gpu.txt* | *cpu.txt*) mkdir -p .venv/lib/python3.12/site-packages/nvidia/cu13/lib &&
        touch .venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcudart.so.13 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has nothing but its scripts, its locks and the stub."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


def setup(checkout: Path, lock: str = "gpu", **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, messages, and what Python was called for."""
    log = checkout / "pip.log"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "MEGATRON_R1_LOCK": lock, "PATH": f"{checkout}/bin:{os.environ['PATH']}", **variables}
    done = subprocess.run(
        ["bash", "launch/setup.sh"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=30
    )
    calls = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stderr, [call for call in calls if "install" in call]


def program(checkout: Path, name: str, text: str) -> None:
    path = checkout / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"BUILDS": "1"}, "Transformer Engine was not built"), ({"IMPORTS": "1"}, "built but cannot be imported")],
)
def test_a_failed_build_stops_and_is_tried_again(checkout, variables, message):
    for _ in range(2):
        code, messages, calls = setup(checkout, **variables)
        assert code == 1 and message in messages.splitlines()[-1] and "done" not in messages
        assert any("gpu-build.txt" in call for call in calls) and not any("--editable" in call for call in calls)
    code, messages, calls = setup(checkout)
    assert code == 0 and "done" in messages and "--editable" in calls[-1]
    assert setup(checkout)[1:] == ("", [])


def test_transformer_engine_is_built_again_for_another_torch_alone(checkout):
    assert setup(checkout)[0] == 0
    for file, text, built in (("pyproject.toml", "# a change", False), ("launch/lock/gpu.txt", "torch==99", True)):
        with (checkout / file).open("a") as changed:
            changed.write(f"{text}\n")
        code, _, calls = setup(checkout)
        builds = [call for call in calls if "gpu-build.txt" in call]
        assert code == 0 and bool(builds) == built
        assert all("--no-cache-dir" in call and "--force-reinstall" in call for call in builds)


def test_libraries_have_the_names_by_which_kernels_link_them(checkout):
    assert setup(checkout)[0] == 0
    (cuda,) = (checkout / ".venv/lib/python3.12/site-packages/nvidia").iterdir()
    assert (cuda / "lib64/libcudart.so").resolve() == cuda / "lib/libcudart.so.13"


@pytest.mark.parametrize(
    ("lock", "programs", "message"),
    [
        ("gpu", {"c++": "exit 1"}, "needs a C++ compiler"),
        ("gpu", {"nvidia-smi": "echo 570.86.15"}, "driver is version 570: CUDA 13 needs 580"),
        ("gpu", {"df": "printf 'Avail\\n 19\\n'"}, "has 19 GB free: launch/lock/gpu.txt needs 20 GB"),
        ("cpu", {"df": "printf 'Avail\\n 7\\n'"}, "has 7 GB free: launch/lock/cpu.txt needs 8 GB"),
    ],
)
def test_a_machine_that_lacks_something_is_refused_before_anything_is_installed(checkout, lock, programs, message):
    for name, text in programs.items():
        program(checkout, name, text)
    code, messages, calls = setup(checkout, lock, CXX="c++")
    assert code == 1 and message in messages and calls == []


def test_headers_of_python_are_missed_before_anything_is_installed(checkout):
    (checkout / "include/Python.h").unlink()
    code, messages, calls = setup(checkout)
    assert code == 1 and "python3-dev" in messages and calls == []


def test_a_login_node_without_a_driver_can_be_set_up(checkout):
    program(checkout, "nvidia-smi", "echo no devices; exit 9")
    assert setup(checkout)[0] == 0


def test_the_compiler_of_the_gpu_lock_fits_its_runtime():
    """nvcc refuses the headers of an older runtime than its own, and each of these brings a part of it."""
    pins = dict(re.findall(r"^(nvidia[\w-]+)==(\d+\.\d+)\.", (ROOT / "launch/lock/gpu.txt").read_text(), re.M))
    parts = [f"nvidia-cuda-{name}" for name in ("nvcc", "crt", "cccl", "runtime", "nvrtc")] + ["nvidia-nvvm"]
    assert {pins[part] for part in parts} == {"13.0"}


def test_the_container_copies_all_that_the_checkout_has():
    lines = (ROOT / "launch/Containerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    made = {"runs", "build", "dist", "wandb", "__pycache__", "megatron_r1.egg-info"}
    assert copied == {path.name for path in ROOT.iterdir() if path.name[0] != "."} - made
