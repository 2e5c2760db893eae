"""The command line of bubblewrap, which defines what a program in the sandbox can access.

The program sees the system's programs and libraries and this Python without its site-packages, all read-only, and one
writable folder in memory, which is deleted afterwards; no network, no /proc, no environment, no other process. It runs
as a user of its own: with a uid that no other process has where the caller is root, otherwise inside a user namespace.
(A user namespace alone is not enough for root: the kernel exempts the real root from the limit on processes, whatever
its uid inside.)
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.reward import SandboxConfig
from megatron_r1.errors import PlatformError

WORK = "/tmp"
"""The writable folder of a program."""
NOBODY = "65534"
FIRST_USER = 1 << 30
"""First uid; above those that systems assign, below 2^31."""
SLOTS = 256
"""Number of uids of one process: no two programs that run at the same time share one."""
OPEN_FILES = 64
SYSTEM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
PYTHON = (os.path.realpath(sys.executable), "-I", "-S", "-B")
"""This interpreter, without the packages installed for it."""


@dataclass(frozen=True)
class Tools:
    """Paths of the programs that make a sandbox."""

    bwrap: str
    prlimit: str
    setpriv: str


def find_tools() -> Tools:
    """Find the programs on this machine.

    Raises:
        PlatformError: one is missing; programs are never run without a sandbox.
    """
    found = {}
    for name, package in (("bwrap", "bubblewrap"), ("prlimit", "util-linux"), ("setpriv", "util-linux")):
        path = shutil.which(name)
        if path is None:
            raise PlatformError(f"programs are run in a sandbox only, and {name} is missing: install {package}")
        found[name] = path
    return Tools(**found)


def real_users() -> bool:
    """Whether this process can set any uid, because it is the machine's real root."""
    if os.geteuid() != 0:
        return False
    first, outside, count = map(int, Path("/proc/self/uid_map").read_text(encoding="ascii").split()[:3])
    return (first, outside) == (0, 0) and count > FIRST_USER * 2 - 1


def user_of(slot: int) -> str:
    """The uid of a slot; unique, because process ids are below 2^22."""
    return str(FIRST_USER + os.getpid() * SLOTS + slot)


def view(config: SandboxConfig) -> list[str]:
    """The file system that a program sees, as options of bubblewrap."""
    options = ["--ro-bind", "/usr", "/usr"]
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        for parent in reversed(prefix.parents[:-1]):  # bubblewrap would make them for root's eyes alone
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(prefix), str(prefix)]
    options += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--dev", "/dev", "--remount-ro", "/dev"]
    return [*options, "--perms", "1777", "--size", str(config.disk_mib << 20), "--tmpfs", WORK]


def bwrap_command(
    tools: Tools,
    config: SandboxConfig,
    slot: int,
    program: list[str],
    files: dict[str, int],
    status: int,
    gate: int,
    seccomp: int,
    memory_mib: int,
) -> list[str]:
    """The whole command.

    Args:
        slot: number of this program among those that run at the same time.
        program: command to run inside.
        files: path inside -> descriptor of its contents.
        status: descriptor to which bubblewrap writes its status.
        gate: descriptor on which bubblewrap waits for a byte before it starts the program.
        seccomp: descriptor of the filter.
        memory_mib: address space of one process.
    """
    private = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    user: list[str] = []
    if real_users():
        number = user_of(slot)
        private += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        user = [tools.setpriv, "--reuid", number, "--regid", number, "--clear-groups", "--"]
    else:
        private += ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    contents = [
        part
        for path, descriptor in files.items()
        for part in ("--perms", "0555", "--ro-bind-data", str(descriptor), path)
    ]
    limits = [
        tools.prlimit,
        f"--as={memory_mib << 20}",
        f"--cpu={config.cpu_s}",
        f"--fsize={config.disk_mib << 20}",
        f"--nofile={OPEN_FILES}",
        f"--nproc={config.processes}",
        "--core=0",
        "--memlock=0",
        "--msgqueue=0",
        "--rtprio=0",
        "--",
    ]
    return [
        tools.bwrap,
        *private,
        "--hostname",
        "sandbox",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        *("--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", WORK, "--setenv", "LANG", "C.UTF-8"),
        *view(config),
        *contents,
        *("--remount-ro", "/"),
        *("--chdir", WORK),
        *("--json-status-fd", str(status), "--block-fd", str(gate), "--seccomp", str(seccomp)),
        *limits,
        *user,
        *program,
    ]
