"""A verifier that does what it is told: right, wrong, hang, or die."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path


def verify(do: str, file: str = "") -> bool:
    if do == "pid":
        with Path(file).open("a") as pids:
            pids.write(f"{os.getpid()}\n")
    elif do == "sleep":
        time.sleep(100)
    elif do == "ignore signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    elif do == "native code":
        deque(itertools.repeat(0), maxlen=0)  # for ever, and no signal handler of Python's runs
    elif do == "die":
        time.sleep(0.1)  # for the trainer to have read who took the answer
        os.kill(os.getpid(), signal.SIGSEGV)
    elif do == "die once" and not Path(file).exists():
        Path(file).touch()
        time.sleep(0.1)
        os._exit(1)
    elif do == "exit":
        sys.exit(1)
    elif do == "print":
        os.write(1, b"on stdout\n")
        print("on stdout too", flush=True)
    elif do == "memory":
        return len(bytearray(4 << 30)) > 0
    elif do == "own session":
        return os.getsid(0) == os.getpid()
    return do != "wrong"


def cannot_start() -> None:
    raise ImportError("no such library")
