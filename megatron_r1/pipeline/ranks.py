"""Starts the ranks of one job on this machine and returns its exit code.

torchrun starts ranks too, but exits with status 1 whatever the ranks' exit codes are; recipes act on these codes (85
requests a restart), so the ranks are started here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from megatron_r1 import lifeline

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL for the ranks that still run when another one has failed."""


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Run `command` as the `ranks` processes of one job, until all have ended.

    Signals to this process are forwarded to all of them. When one fails, the others are ended; when this process dies,
    they die too.

    Returns:
        Exit code of the first rank that failed, or 0.
    """
    common = os.environ | lifeline.variables()
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(command, env=common | (_rank_variables(rank, ranks) if ranks > 1 else {}))
        for rank in range(ranks)
    ]

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    # A terminal sends Ctrl-C to the ranks too, which save and exit; a scheduler's signal must be forwarded.
    handlers = {signal.SIGTERM: forward, signal.SIGUSR1: forward, signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    failed = 0
    deadline = float("inf")
    while running := [process for process in processes if process.poll() is None]:
        if not failed and (failed := next((p.returncode for p in processes if p.returncode), 0)):
            deadline = time.monotonic() + GRACE_S
            for process in running:
                process.terminate()
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    return failed or next((p.returncode for p in processes if p.returncode), 0)


def _rank_variables(rank: int, ranks: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
