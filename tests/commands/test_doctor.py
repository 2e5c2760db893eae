"""What doctor says a machine has, lacks or does not know; machines are played by their programs."""

from __future__ import annotations

import os
import platform
import resource
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.commands import doctor
from megatron_r1.commands.doctor import HAS, LACKS, UNKNOWN, MachineFact
from megatron_r1.config.load import load
from megatron_r1.config.secrets import is_secret
from megatron_r1.errors import PlatformError
from megatron_r1.platform import shared_memory
from megatron_r1.platform.installed import LockFile
from megatron_r1.platform.source_code import SourceCode
from megatron_r1.runs.provenance import attempt_facts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of a machine that has nothing else; they print a line."""

    def write(name: str, line: str, status: int = 0) -> None:
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{line}'\nexit {status}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "driver", lambda: None)
    return write


def fact(facts, what: str) -> MachineFact:
    return next(one for one in facts if one.what == what)


def test_the_driver_is_named_by_its_version(programs):
    found = fact(doctor.graphics(), "NVIDIA driver")
    assert found.state == LACKS and "580 or newer" in found.change
    programs("nvidia-smi", "580.95.05")
    assert fact(doctor.graphics(), "NVIDIA driver") == MachineFact("NVIDIA driver", HAS, "580.95.05")
    programs("nvidia-smi", "535.1.2")
    assert fact(doctor.graphics(), "NVIDIA driver").state == LACKS


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        ("0, NVIDIA H200, 0, 5", HAS, "1 of NVIDIA H200"),
        ("0, NVIDIA H200, 2, 5", LACKS, "GPU 0: 2 uncorrected ECC errors"),
        ("No devices were found", LACKS, "No devices were found"),
    ],
)
def test_gpus_are_named_with_their_faults(programs, line, state, words):
    programs("nvidia-smi", line)
    found = fact(doctor.graphics(), "GPUs")
    assert found.state == state and words in found.found and (state == HAS) == (not found.change)


def test_the_compiler_of_kernels_is_named_by_its_release(programs, tmp_path):
    assert "does not run" in fact(doctor.graphics(), "CUDA compiler").found
    programs("bin/nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    assert fact(doctor.graphics(), "CUDA compiler").found == f"{tmp_path}/bin/nvcc, release 13.0"


def test_apex_is_named_by_its_extensions_and_recorded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert "not installed" in doctor._apex().found and attempt_facts()[0]["apex"] == []
    for name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)  # forgets what it did not find
    assert doctor._apex() == MachineFact("NVIDIA Apex", HAS, "amp_C, fused_weight_gradient_mlp_cuda")
    assert attempt_facts()[0]["apex"] == ["amp_C", "fused_weight_gradient_mlp_cuda"]
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "another project" in doctor._apex().found


def test_slurm_and_sandbox_are_there_when_they_answer(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = list(doctor.services())
    assert fact(facts, "SLURM").state == fact(facts, "sandbox").state == LACKS
    programs("sbatch", "slurm 22.05")
    assert fact(doctor.services(), "SLURM").state == UNKNOWN
    programs("scontrol", "Slurmctld(primary) at a is UP")
    assert fact(doctor.services(), "SLURM").found == "slurm 22.05, Slurmctld(primary) at a is UP"
    for name in ("bwrap", "prlimit", "setpriv"):
        programs(name, "bubblewrap 0.8.0")
    assert fact(doctor.services(), "sandbox") == MachineFact("sandbox", HAS, "bubblewrap 0.8.0")
    programs("bwrap", "no permission", status=1)
    found = fact(doctor.services(), "sandbox")
    assert found.state == LACKS and "user namespaces" in found.change


def test_packages_say_who_needs_them(monkeypatch):
    versions = {"torch": "2.14.1", "sglang": None, "wandb": None, "transformer-engine": None}
    monkeypatch.setattr(doctor, "versions", lambda: versions)
    found = {name: fact(doctor.software(), name) for name in ("python", *versions)}
    assert found["python"].found == platform.python_version()
    assert found["torch"] == MachineFact("torch", HAS, "2.14.1")
    assert [name for name, one in found.items() if doctor._broken(one)] == ["sglang"], "nothing runs without it"
    assert "for GPUs alone" in found["transformer-engine"].change and "GPU" not in found["wandb"].change


@pytest.mark.parametrize(
    ("installed", "state", "words"),
    [
        (None, UNKNOWN, "not beside the package"),
        (LockFile("cpu.txt", "12ab", ()), HAS, "all packages as in cpu.txt"),
        (
            LockFile("cpu.txt", "12ab", ("a 1, 2", "b 1, 2", "c 1, 2", "d 1, 2")),
            LACKS,
            "4 packages are not as in cpu.txt",
        ),
    ],
)
def test_what_differs_from_the_lock_is_counted(monkeypatch, installed, state, words):
    monkeypatch.setattr(doctor, "lock", lambda: installed)
    found = doctor._lock()
    assert found.state == state and words in found.found and "d 1, 2" not in found.found
    assert (found.change == doctor.SETUP) == (state == LACKS)


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (SourceCode(unknown="git is not installed"), UNKNOWN, "git is not installed"),
        (SourceCode(commit="12ab", dirty=False), HAS, "12ab, no branch"),
        (SourceCode(commit="12ab", branch="main", dirty=True, changed=("a",), untracked_files=2), HAS,
         "12ab, main, 1 files changed, 2 untracked"),
    ],
)  # fmt: skip
def test_the_source_code_is_named_by_its_commit(monkeypatch, code, state, words):
    monkeypatch.setattr(doctor, "source_code", lambda folder: code)
    found = fact(doctor.software(), "source code")
    assert (found.state, found.found) == (state, words) and bool(found.change) == (state == UNKNOWN)


def test_a_platform_that_cannot_be_had_is_broken(monkeypatch):
    def refuse(requested: str) -> None:
        raise PlatformError(f"platform={requested}: no usable GPU")

    monkeypatch.setattr(doctor, "select", refuse)
    found = doctor._platform("cuda")
    assert found.found == "platform=cuda: no usable GPU" and doctor._broken(found)


def test_cores_memory_files_and_compiler_are_those_of_the_machine(programs, tmp_path, monkeypatch):
    texts = {
        "/proc/meminfo": "MemTotal:  33554432 kB\nMemAvailable: 16777216 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
    }
    monkeypatch.setattr(doctor, "_text", lambda path: texts.get(path, ""))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    programs("compiler", "g++ 14")
    facts = list(doctor.system())
    assert fact(facts, "cores").found.startswith("96, 2 for this process")
    assert fact(facts, "memory").found == "32 GiB, 16 free"
    assert fact(facts, "open files").change == "ulimit -n 4096"
    assert fact(facts, "C++ compiler") == MachineFact("C++ compiler", HAS, "g++ 14")
    texts["/sys/fs/cgroup/memory.max"] = f"{8 << 30}\n"
    assert doctor._memory().found == "32 GiB, 16 free; 8 GiB for this container"
    del texts["/proc/meminfo"]
    assert doctor._memory().state == UNKNOWN
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (tmp_path / "compiler").unlink()
    facts = list(doctor.system())
    assert fact(facts, "open files").state == HAS and fact(facts, "C++ compiler").state == LACKS


def test_a_folder_that_cannot_be_written_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "access", lambda folder, _: Path(folder) != tmp_path)
    facts = list(doctor.system())
    found = fact(facts, "temporary files")
    assert f"{tmp_path}: " in found.found and "not writable" in found.found and doctor._broken(found)
    assert "TMPDIR" in found.change and not doctor._broken(fact(facts, "disk"))


def test_small_shared_memory_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path)
    assert doctor._shared_memory().state == HAS
    monkeypatch.setattr(doctor, "GIB", 1 << 60)
    assert doctor._shared_memory().state == LACKS


def test_keys_are_named_and_not_shown(monkeypatch):
    for name in [name for name in os.environ if is_secret(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_API_KEY", "")
    facts = list(doctor.services())
    assert fact(facts, "wandb's key").state == fact(facts, "other keys").state == LACKS
    assert fact(facts, "other keys").found == "none"
    monkeypatch.setenv("WANDB_API_KEY", "12ab")
    monkeypatch.setenv("HF_TOKEN", "12ab")
    facts = list(doctor.services())
    assert fact(facts, "wandb's key") == MachineFact("wandb's key", HAS, "in WANDB_API_KEY (not shown)")
    assert fact(facts, "other keys") == MachineFact("other keys", HAS, "HF_TOKEN")


def test_left_overs_in_shared_memory_are_named_and_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path)
    folder = shared_memory.make_folder("weights", {})
    found = fact(doctor.system(), "shared memory")
    assert found.state == UNKNOWN and folder.name in found.found and folder.is_dir()
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path / "none")
    assert fact(doctor.system(), "shared memory").state == LACKS


@pytest.mark.parametrize(
    ("text", "state"), [("32768\t60999\n", HAS), ("32000 60999", HAS), ("10000 60999", LACKS), ("", UNKNOWN)]
)
def test_ports_of_jobs_lie_below_those_of_connections(monkeypatch, text, state):
    monkeypatch.setattr(doctor, "_text", lambda path: text)
    found = doctor._ports()
    assert found.state == state and ("ip_local_port_range='32000 60999'" in found.change) == (state == LACKS)


def test_a_disk_without_room_is_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fact(doctor.system(), "disk").state == HAS
    monkeypatch.setattr(doctor, "GIB", 1 << 60)
    found = fact(doctor.system(), "disk")
    assert found.state == LACKS and doctor._broken(found)


def test_what_nothing_runs_without_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": None, "transformer-engine": None})
    with pytest.raises(PlatformError, match="^torch: not installed$"):
        doctor.run(load("doctor", ["platform=cpu"]))
    assert "launch/setup.sh installs it" in capsys.readouterr().out


def test_a_machine_without_gpus_is_sound_and_no_key_is_shown(tmp_path):
    keys = {name: secrets.token_hex(20) for name in ("WANDB_API_KEY", "JUDGE_API_KEY")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", "doctor", "platform=cpu"],
        env=os.environ | keys | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert "cpu, gloo, torch modules in its layout" in shown and "in WANDB_API_KEY (not shown)" in shown
    assert "JUDGE_API_KEY" in shown and not [name for name, key in keys.items() if key in done.stdout + done.stderr]
    for what in ("python", "GPUs", "lock file", "SLURM", "disk", "memory", "ports of jobs", "C++ compiler", "sandbox"):
        assert f"│ {what} " in done.stdout
