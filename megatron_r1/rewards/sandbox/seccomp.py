"""The seccomp filter of the sandbox: system calls that a program may not use.

Namespaces hide the machine, and limits bound what the kernel counts per process. The filter closes what both leave
open: further namespaces and mounts (the kernel's own attack surface), tracing, memory that no limit counts (System V
segments, memfds), io_uring, and sockets outside of the network namespace (AF_VSOCK reaches the host of a virtual
machine). Numbers are those of the kernel's headers, asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

from megatron_r1.errors import PlatformError

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF, 32-bit words
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
LOCAL_SOCKETS = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: what the empty network namespace bounds
X32 = 0x40000000  # x86-64's second table of the same calls

# Above 424 every architecture has the same numbers: io_uring, the new mount calls, pidfd_getfd, process_madvise,
# mount_setattr, memfd_secret.
EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 447)


@dataclass(frozen=True)
class Table:
    """System call numbers of one architecture."""

    audit: int
    """As the kernel tells a filter which architecture a call is of."""
    clone: int
    socket: int
    refused: tuple[int, ...]
    """In the order of the names beside each table."""


# unshare setns mount umount2 pivot_root chroot ptrace process_vm_readv process_vm_writev bpf perf_event_open keyctl
# add_key request_key userfaultfd memfd_create shmget shmctl shmat msgget semget mq_open kexec_load kexec_file_load
# init_module finit_module delete_module open_by_handle_at name_to_handle_at kcmp syslog personality
TABLES = {
    "x86_64": Table(
        0xC000003E,
        clone=56,
        socket=41,
        refused=(
            *(272, 308, 165, 166, 155, 161, 101, 310, 311, 321, 298, 250),
            *(248, 249, 323, 319, 29, 31, 30, 68, 64, 240, 246, 320),
            *(175, 313, 176, 304, 303, 312, 103, 135),
        ),
    ),
    "aarch64": Table(
        0xC00000B7,
        clone=220,
        socket=198,
        refused=(
            *(97, 268, 40, 39, 41, 51, 117, 270, 271, 280, 241, 219),
            *(217, 218, 282, 279, 194, 195, 196, 186, 190, 180, 104, 294),
            *(105, 273, 106, 265, 264, 272, 116, 92),
        ),
    ),
}
CLONE3 = 435


def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; `yes` and `no` are the instructions to skip after a comparison."""
    return struct.pack("=HBBI", code, yes, no, value)


def refuse(number: int, error: int) -> bytes:
    """A call with this number fails with `error`."""
    return step(EQUAL, number, no=1) + step(RETURN, ERROR | error)


def seccomp_filter(machine: str = "") -> bytes:
    """The filter for this machine, as `bwrap --seccomp` reads it.

    Raises:
        PlatformError: the numbers of this architecture's calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in TABLES:
        raise PlatformError(f"the sandbox knows the system calls of {' and '.join(TABLES)} only, this is {machine}")
    table = TABLES[machine]
    return b"".join(
        (
            step(LOAD, ARCHITECTURE),
            step(EQUAL, table.audit, yes=1),
            step(RETURN, KILL),
            step(LOAD, NUMBER),
            step(AT_LEAST, X32, no=1),
            step(RETURN, ERROR | errno.ENOSYS),
            *(refuse(number, errno.EPERM) for number in (*table.refused, *EVERYWHERE)),
            refuse(CLONE3, errno.ENOSYS),  # its flags are out of a filter's reach; libraries fall back to clone
            step(EQUAL, table.clone, no=4),
            step(LOAD, FIRST_ARGUMENT),
            step(ANY_BIT, NEW_NAMESPACES, no=1),
            step(RETURN, ERROR | errno.EPERM),
            step(RETURN, ALLOW),
            step(EQUAL, table.socket, no=5),
            step(LOAD, FIRST_ARGUMENT),
            *(step(EQUAL, family, yes=len(LOCAL_SOCKETS) - index) for index, family in enumerate(LOCAL_SOCKETS)),
            step(RETURN, ERROR | errno.EAFNOSUPPORT),
            step(RETURN, ALLOW),
        )
    )
