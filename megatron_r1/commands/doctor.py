"""doctor: what this machine has and lacks of what the program can use, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform as machine
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.config.recipes import PACKAGE
from megatron_r1.config.run import RunConfig
from megatron_r1.config.secrets import is_secret
from megatron_r1.errors import PlatformError
from megatron_r1.platform import select, shared_memory
from megatron_r1.platform.gpus import gpus
from megatron_r1.platform.installed import driver, lock, versions
from megatron_r1.platform.kernels import HOW_TO_BUILD_APEX, apex_extensions
from megatron_r1.platform.launcher import FIRST_PORT, PORTS
from megatron_r1.platform.source_code import source_code
from megatron_r1.rewards.sandbox.command import find_tools

HAS, LACKS, UNKNOWN = "has", "lacks", "unknown"
STYLES = {LACKS: "yellow", UNKNOWN: "cyan"}
WIDTH = 150
GIB = 1 << 30
OLDEST_DRIVER = 580
"""CUDA 13 needs this one or a newer one."""
NEEDED = ("torch", "megatron-core", "transformers", "tokenizers", "sglang")
SETUP = "launch/setup.sh installs it"
FEWEST_FILES = 4096
COMMAND_S = 20


@dataclass(frozen=True, slots=True)
class MachineFact:
    """One row of the table."""

    what: str
    state: str
    """HAS, LACKS or UNKNOWN."""
    found: str
    change: str = ""
    """What to do, where it is lacking or not known."""
    needed: bool = False
    """Whether nothing runs without it."""


def run(config: RunConfig) -> None:
    """Print the table.

    Raises:
        PlatformError: something without which nothing runs is lacking or broken.
    """
    facts = [*software(), _platform(config.platform), *graphics(), *system(), *services()]
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH if not console.is_terminal else 0)
    table = Table(title="megatron-r1 doctor", title_justify="left")
    for column in ("what", "state", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for fact in facts:
        row = (fact.what, fact.state, escape(fact.found), escape(fact.change))
        table.add_row(*row, style="bold red" if _broken(fact) else STYLES.get(fact.state))
    console.print(table)
    if broken := [f"{fact.what}: {fact.found}" for fact in facts if _broken(fact)]:
        raise PlatformError("; ".join(broken))


def _broken(fact: MachineFact) -> bool:
    return fact.needed and fact.state == LACKS


def software() -> Iterator[MachineFact]:
    """Python, packages and the source code."""
    yield MachineFact("python", HAS, machine.python_version())
    for package, version in versions().items():
        if version:
            yield MachineFact(package, HAS, version)
        elif package.startswith(("transformer-engine", "sgl-deep-ep", "nvidia-")):
            gpu_only = "for GPUs alone: MEGATRON_R1_LOCK=gpu launch/setup.sh installs it"
            yield MachineFact(package, LACKS, "not installed", gpu_only)
        else:
            yield MachineFact(package, LACKS, "not installed", SETUP, package in NEEDED)
    yield _lock()
    code = source_code(PACKAGE.parent)
    if code.unknown:
        yield MachineFact("source code", UNKNOWN, code.unknown, "runs record no commit; install git, or use a checkout")
    else:
        changes = f", {len(code.changed)} files changed, {code.untracked_files} untracked" if code.dirty else ""
        yield MachineFact("source code", HAS, f"{code.commit}, {code.branch or 'no branch'}{changes}")


def _lock() -> MachineFact:
    found = lock()
    if found is None:
        return MachineFact(
            "lock file", UNKNOWN, "not beside the package", "install from a checkout to compare versions"
        )
    if found.differing:
        some = "; ".join(found.differing[:3])
        return MachineFact(
            "lock file", LACKS, f"{len(found.differing)} packages are not as in {found.file}: {some}", SETUP
        )
    return MachineFact("lock file", HAS, f"all packages as in {found.file}")


def graphics() -> Iterator[MachineFact]:
    """GPUs, their driver, and what compiles for them."""
    version = (
        driver() or _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    )
    try:
        found = gpus()
    except OSError as error:
        yield MachineFact("GPUs", LACKS, str(error), "without GPUs, platform=cpu runs small models")
    else:
        faults = [f"GPU {gpu.index}: {fault}" for gpu in found for fault in gpu.faults]
        names = ", ".join(dict.fromkeys(gpu.name for gpu in found))
        shown = "; ".join(faults) or f"{len(found)} of {names}"
        yield MachineFact("GPUs", LACKS if faults else HAS, shown, "reset them (nvidia-smi -r)" if faults else "")
    if not version:
        yield MachineFact("NVIDIA driver", LACKS, "none", f"GPUs need {OLDEST_DRIVER} or newer, as CUDA 13 does")
    elif int(version.partition(".")[0]) < OLDEST_DRIVER:
        yield MachineFact("NVIDIA driver", LACKS, version, f"install {OLDEST_DRIVER} or newer: CUDA 13 needs it")
    else:
        yield MachineFact("NVIDIA driver", HAS, version)
    yield _cuda_compiler()
    yield _apex()


def _cuda_compiler() -> MachineFact:
    """The nvcc by which servers compile kernels at their first start, which takes minutes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release ([\d.]+)", _output(nvcc, "--version"))
    if release:
        return MachineFact("CUDA compiler", HAS, f"{nvcc}, release {release[1]}")
    change = "on GPUs, SGLang's servers compile kernels with it: set CUDA_HOME"
    return MachineFact("CUDA compiler", LACKS, f"{nvcc} does not run", change)


def _apex() -> MachineFact:
    """State of NVIDIA's apex. PyPI's `apex` is another project; NVIDIA's has `apex.optimizers`."""
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.optimizers"):
        return MachineFact("NVIDIA Apex", LACKS, "another project of the same name is installed", "pip uninstall apex")
    if extensions := apex_extensions():
        return MachineFact("NVIDIA Apex", HAS, ", ".join(extensions))
    change = f"only performance.gradient_accumulation_fusion needs it; {HOW_TO_BUILD_APEX}"
    return MachineFact("NVIDIA Apex", LACKS, "not installed", change)


def _platform(requested: str) -> MachineFact:
    try:
        chosen = select(requested)
    except PlatformError as error:
        return MachineFact("platform", LACKS, str(error), "", needed=True)
    parts = "Transformer Engine" if chosen.transformer_engine else "torch modules in its layout"
    return MachineFact("platform", HAS, f"{chosen.name}, {chosen.backend}, {parts}")


def system() -> Iterator[MachineFact]:
    """Cores, memory, disks, shared memory, ports and limits."""
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield MachineFact("cores", HAS, f"{cores}, {usable} for this process; OMP_NUM_THREADS {threads}")
    yield _memory()
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        writable = os.access(folder, os.W_OK | os.X_OK)
        shown = f"{folder}: {free / GIB:.1f} GiB free" + ("" if writable else ", not writable")
        change = "make room, or run elsewhere" if name == "disk" else "make room, or set TMPDIR"
        enough = writable and free >= GIB
        yield MachineFact(name, HAS if enough else LACKS, shown, "" if enough else change, needed=True)
    yield _shared_memory()
    yield _ports()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < FEWEST_FILES
    yield MachineFact(
        "open files", LACKS if few else HAS, f"at most {files}", f"ulimit -n {FEWEST_FILES}" if few else ""
    )
    name = os.environ.get("CXX", "c++")
    version = _output(name, "--version").partition("\n")[0]
    change = "Debian: g++; builds Transformer Engine, and programs in C++ that models write"
    yield MachineFact(
        "C++ compiler", HAS if version else LACKS, version or f"{name} does not run", "" if version else change
    )


def _memory() -> MachineFact:
    found = dict(re.findall(r"(\w+): +(\d+) kB", _text("/proc/meminfo")))
    if "MemTotal" not in found:
        return MachineFact("memory", UNKNOWN, "/proc/meminfo does not say", "")
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    share = f"; {int(limit) / GIB:.0f} GiB for this container" if limit.isdecimal() else ""
    total, free = (int(found.get(key, 0)) / 2**20 for key in ("MemTotal", "MemAvailable"))
    return MachineFact("memory", HAS, f"{total:.0f} GiB, {free:.0f} free{share}")


def _shared_memory() -> MachineFact:
    folder = shared_memory.MEMORY
    if not folder.is_dir():
        return MachineFact("shared memory", LACKS, f"no {folder}", "mount it: weights go to servers through it")
    usage = shutil.disk_usage(folder)
    shown = f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} free"
    if left := [path.name for path in shared_memory.left_over(folder)]:
        what = f"{shown}; of this program: {', '.join(left[:3])}"
        return MachineFact("shared memory", UNKNOWN, what, "remove them if no run of yours goes on here")
    if usage.total < GIB:
        return MachineFact("shared memory", LACKS, shown, "give the container the machine's (docker: --ipc=host)")
    return MachineFact("shared memory", HAS, shown)


def _ports() -> MachineFact:
    """Whether the ports of jobs lie below those that Linux gives to connections, and can be used."""
    last = FIRST_PORT + PORTS - 1
    given = re.match(r"(\d+)\s+(\d+)", _text("/proc/sys/net/ipv4/ip_local_port_range"))
    if not given:
        return MachineFact("ports of jobs", UNKNOWN, "the kernel does not say which ports it gives to connections")
    if int(given[1]) <= last:
        change = f"a connection may take a job's port: sysctl net.ipv4.ip_local_port_range='{last + 1} 60999'"
        return MachineFact("ports of jobs", LACKS, f"{FIRST_PORT} to {last}, and connections from {given[1]}", change)
    with socket.socket() as probe:
        try:
            probe.bind(("", 0))
        except OSError as error:
            return MachineFact("ports of jobs", LACKS, f"no port can be opened: {error}", "allow it", needed=True)
    return MachineFact("ports of jobs", HAS, f"{FIRST_PORT} to {last}, below those of connections")


def services() -> Iterator[MachineFact]:
    """Sandbox, SLURM, and keys, which are not shown."""
    yield _sandbox()
    yield _slurm()
    if os.environ.get("WANDB_API_KEY"):
        yield MachineFact("wandb's key", HAS, "in WANDB_API_KEY (not shown)")
    else:
        change = "set it in the environment or in cluster.env_file; without it, runs are written offline"
        yield MachineFact("wandb's key", LACKS, "no WANDB_API_KEY", change)
    keys = [name for name, value in os.environ.items() if is_secret(name) and value and name != "WANDB_API_KEY"]
    yield MachineFact("other keys", HAS if keys else LACKS, ", ".join(sorted(keys)) or "none", "" if keys else _KEYS)


_KEYS = "HF_TOKEN for private folders, JUDGE_API_KEY for a judge behind a key"


def _slurm() -> MachineFact:
    if not shutil.which("sbatch"):
        change = "for `submit` alone, which runs on a cluster's login node"
        return MachineFact("SLURM", LACKS, "no sbatch here", change)
    if " is UP" in (shown := _output("scontrol", "ping")):
        return MachineFact("SLURM", HAS, f"{_output('sbatch', '--version')}, {' '.join(shown.split())}")
    return MachineFact("SLURM", UNKNOWN, "sbatch is here, and no controller answers", "scontrol ping says why")


def _sandbox() -> MachineFact:
    change = "rewards by programs (code) need it"
    try:
        bwrap = find_tools().bwrap
    except PlatformError as error:
        return MachineFact("sandbox", LACKS, str(error), change)
    tried = ["--ro-bind", "/", "/", "--unshare-all", "true"]
    done = subprocess.run([bwrap, *tried], capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode:
        reason = " ".join(done.stderr.split())[:150]
        return MachineFact("sandbox", LACKS, f"bubblewrap fails: {reason}", f"{change}: allow user namespaces")
    return MachineFact("sandbox", HAS, _output(bwrap, "--version"))


def _output(*command: str) -> str:
    """What a program prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _text(path: str) -> str:
    """The text of a file of the kernel; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
