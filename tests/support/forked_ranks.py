"""Ranks of one machine that are forks of this process, for programs that have imported everything before.

A rank is there at once, where one that torchrun starts takes five seconds of a core to import torch and megatron-core.
It has the variables by which torchrun lets ranks find each other; a program that computes in several layouts calls
`meet_elsewhere()` inside each one's process groups.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable


def fork_ranks(ranks: int, run: Callable[[], None]) -> int:
    """Exit status of the first rank that fails, whose fellows are then ended, or 0."""
    from megatron_r1.platform.ports import reserve_ports

    [port] = reserve_ports(1)
    running = {_fork_rank(rank, ranks, port, run) for rank in range(ranks)}
    failed = 0
    while running:
        ended = _ended(running)
        running -= {pid for pid, _ in ended}
        for _, status in ended:
            if status and not failed:
                failed = os.waitstatus_to_exitcode(status) or 1
                for other in running:
                    os.kill(other, signal.SIGKILL)
    return abs(failed)


def _ended(ranks: set[int]) -> list[tuple[int, int]]:
    """Process id and status of ranks that have ended, once there are any; other children of this process are left."""
    while True:
        if ended := [found for pid in sorted(ranks) if (found := os.waitpid(pid, os.WNOHANG))[0]]:
            return ended
        time.sleep(0.01)


def meet_elsewhere() -> None:
    """Collective, inside `process_groups`: lets the ranks join other groups afterwards, by a port not yet used."""
    from megatron_r1.parallel import comm
    from megatron_r1.platform.ports import reserve_ports

    os.environ["MASTER_PORT"] = str(comm.broadcast(reserve_ports(1)[0], source=0))


def _fork_rank(rank: int, ranks: int, port: int, run: Callable[[], None]) -> int:
    if pid := os.fork():
        return pid
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    status = 1
    try:
        run()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
