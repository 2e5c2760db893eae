"""Start other processes, with a deadline, and leave none behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import psutil

MARK = "MEGATRON_R1_TEST"
"""Variable of the environment by which a test finds the processes that it has started."""


def run_to_the_end(command: list[str], seconds: float) -> None:
    """Run a command that must succeed; nothing that it started is left behind."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            # The launcher's ranks are in sessions of their own: it must be asked to end them.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output


def marked_processes(mark: str) -> list[psutil.Process]:
    """Processes that were started with MEGATRON_R1_TEST=mark, or by one that was."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found
