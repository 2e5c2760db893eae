"""What test_servers_of_a_job.py runs in Python's place in a job. `serve` listens where its command line says that
servers are; the trainer looks for them where its command line and SLURM say so, and writes down what it found.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from megatron_r1.config.load import load
from megatron_r1.config.sglang import SlurmConfig
from megatron_r1.rollout.sglang.servers.discovery import ADMIN_KEY, API_KEY
from megatron_r1.rollout.sglang.servers.slurm import addresses, wait_for

WAIT_S = 60


def serve(ports: list[int]) -> None:
    """Listen until the job ends this role; answer with the keys."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("", port))) for port in ports]
        while True:
            for server in listening:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(f"{os.environ[API_KEY]} {os.environ[ADMIN_KEY]}".encode())


def train(slurm: SlurmConfig, result: Path) -> None:
    urls = addresses(slurm, os.environ)
    wait_for(urls, WAIT_S)
    host, port = urls[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as connection:
        keys = connection.makefile().read()
    own = f"{os.environ[API_KEY]} {os.environ[ADMIN_KEY]}"
    found = {
        "urls": urls,
        "keys_agree": keys == own,
        "keys": len(set(own.split())),
        "node": os.environ["SLURMD_NODENAME"],
        "ignores_warning": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN,
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    _, _, *words = sys.argv[1:]  # after "-m megatron_r1"
    serving = words[0] == "serve"
    verb, _, recipe, *overrides = words[serving:]
    config = load(verb, overrides, recipe)
    where = config.rollout.sglang.slurm
    if serving:
        serve(where.ports)
    else:
        train(where, Path(f"{config.name}.json"))
