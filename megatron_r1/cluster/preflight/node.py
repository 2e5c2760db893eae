"""Checks of one node, which need no other node."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_r1.cluster.preflight.finding import FAILED, OK, WARNING, NodeFinding
from megatron_r1.platform import shared_memory
from megatron_r1.platform.gpus import gpus
from megatron_r1.rewards.judge.reachable import unreachable
from megatron_r1.rollout.sglang.servers.leftovers import remove_of_dead_servers

GIB = 1 << 30
LEAST_DISK = GIB
LEAST_SHARED_MEMORY = GIB
"""Bytes of /dev/shm; containers have 64 MiB where nothing gives them more, too few for NCCL and SGLang."""
USED_MIB = 2048
"""Memory of a GPU that its driver alone does not use."""
JUDGE_S = 10.0


def check_gpus(node: str, expected: int) -> Iterator[NodeFinding]:
    """The expected number of GPUs, each without faults and free."""
    try:
        found = gpus()
    except OSError as error:
        yield NodeFinding(node, "GPUs", FAILED, f"0 of {expected}: {error}", f"{_drain(node)}, or mend the profile")
        return
    if len(found) < expected:
        what = f"{len(found)} of {expected}"
        yield NodeFinding(
            node, "GPUs", FAILED, what, f"{_drain(node)}, or set cluster.gpus_per_node to what nodes have"
        )
    faults = [f"GPU {gpu.index}: {fault}" for gpu in found for fault in gpu.faults]
    if faults:
        yield NodeFinding(node, "GPUs", FAILED, "; ".join(faults), f"{_drain(node)}, and have its GPUs reset")
    if busy := [gpu.index for gpu in found if gpu.used_mib > USED_MIB]:
        what = f"other processes use memory of GPU {', '.join(busy)}"
        yield NodeFinding(node, "GPUs", WARNING, what, f"end them, or {_drain(node)}")
    if found and len(found) >= expected and not faults:
        yield NodeFinding(node, "GPUs", OK, f"{len(found)} of {found[0].name}")


def _drain(node: str) -> str:
    return f"leave the node out (cluster.sbatch_options=['--exclude={node}'])"


def check_disks(node: str, run: Path) -> Iterator[NodeFinding]:
    """Free disk and inodes where the run and temporary files are."""
    shown = []
    for name, folder in (("run folder", run), ("TMPDIR", Path(tempfile.gettempdir()))):
        try:
            free, files = shutil.disk_usage(folder).free, os.statvfs(folder)
        except OSError as error:
            yield NodeFinding(node, "disk", FAILED, f"{name} {folder}: {error.strerror}", "mount it on the nodes")
            continue
        if free < LEAST_DISK or (files.f_files and not files.f_favail):
            what = f"{name} {folder}: {free / GIB:.1f} GiB and {files.f_favail} files free"
            yield NodeFinding(node, "disk", FAILED, what, "make room")
        shown.append(f"{name} {free / GIB:.0f} GiB free")
    yield NodeFinding(node, "disk", OK, ", ".join(shown))


def check_shared_memory(node: str) -> Iterator[NodeFinding]:
    """Size of /dev/shm, and what jobs of ours that have ended left there, which is removed."""
    folder = shared_memory.MEMORY
    if not folder.is_dir():
        yield NodeFinding(node, "shared memory", WARNING, f"no {folder}", "mount it: servers and NCCL use it")
        return
    removed = 0
    for path in shared_memory.left_over(folder):
        size = shared_memory.size_of(path)
        if shared_memory.maker_is_gone(path):
            shared_memory.remove(path)
            removed += size
        else:
            what = f"{path} has {size / GIB:.1f} GiB, of a job that is not known to have ended"
            yield NodeFinding(node, "shared memory", WARNING, what, "remove it if no job of yours runs there")
    servers = remove_of_dead_servers()
    usage = shutil.disk_usage(folder)
    if usage.total < LEAST_SHARED_MEMORY:
        what = f"{folder} has {usage.total >> 20} MiB"
        yield NodeFinding(node, "shared memory", WARNING, what, "give the container the node's (docker: --ipc=host)")
    left = f", {removed / GIB:.1f} GiB of ended jobs removed" if removed else ""
    left += f", what {servers} dead servers left removed" if servers else ""
    yield NodeFinding(node, "shared memory", OK, f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free{left}")


def check_ports(node: str, ports: Sequence[int]) -> Iterator[NodeFinding]:
    """Ports of the job on which nothing listens."""
    in_use = [str(port) for port in ports if not _is_free(port)]
    if in_use:
        change = f"another job made the same ports of its number: submit again, or {_drain(node)}"
        yield NodeFinding(node, "ports", FAILED, f"{', '.join(in_use)} in use", change)
    else:
        yield NodeFinding(node, "ports", OK, f"{', '.join(map(str, ports))} free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def check_judges(node: str, urls: Iterable[str]) -> Iterator[NodeFinding]:
    """Endpoints of judges that rewards call."""
    for url in urls:
        if reason := unreachable(url, JUDGE_S):
            change = "start it, or set reward.judge_config.url to where nodes reach it"
            yield NodeFinding(node, "judge", FAILED, f"{url} does not answer ({reason})", change)
        else:
            yield NodeFinding(node, "judge", OK, f"{url} answers")
