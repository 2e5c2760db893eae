"""A rank that torchrun has forked: runs a program, a file or a module by its name, as a fresh interpreter would.

torchrun ... forked_rank.py PROGRAM [ARGUMENT ...]; its process is named rank-0, rank-1 ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.support.fork_server import run_program

if __name__ == "__main__":
    # The launcher's handlers, which a program that it executes does not get.
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Path("/proc/self/comm").write_text(f"rank-{os.environ['RANK']}")
    run_program(sys.argv[1:])
