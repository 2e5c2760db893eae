"""What the two components of test_servers_of_a_job.py's SLURM job run: `serve` starts a server, `ask` finds it.

Both are given a folder that holds the model, and the server's port; keys come by the environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from megatron_r1.config.sglang import ServerConfig, SGLangConfig, SlurmConfig
from tests.support.samples import tokens_of

LENGTH = 64


def serve(folder: Path, port: int) -> None:
    from megatron_r1.rollout.sglang.client import Endpoint
    from megatron_r1.rollout.sglang.servers.arguments import server_arguments, server_environment
    from megatron_r1.rollout.sglang.servers.discovery import ADMIN_KEY, API_KEY
    from megatron_r1.rollout.sglang.servers.process import Server

    config = SGLangConfig(max_running_requests=4, max_total_tokens=1024)
    arguments = server_arguments(
        folder / "model", config, device="cpu", dtype="float32", context_length=LENGTH, version="theirs"
    )
    endpoint = Endpoint(f"http://127.0.0.1:{port}", os.environ[API_KEY], os.environ[ADMIN_KEY])
    server = Server(arguments, server_environment("cpu", ServerConfig()), folder / "server.log", endpoint)
    try:
        while not (folder / "answers.json").exists():
            server.check()
            time.sleep(0.1)
    finally:
        server.close()


def ask(folder: Path, port: int) -> None:
    from megatron_r1.rollout.engine import Request, Sampling, require_completions
    from megatron_r1.rollout.sglang.engine import SGLangEngine

    slurm = SlurmConfig(nodes="component", component=1, ports=[port])
    config = SGLangConfig(slurm=slurm, start_timeout_s=60)
    with SGLangEngine(folder / "model", config, folder, "cpu", "float32", context_length=LENGTH) as engine:
        completions = require_completions(engine.generate([Request("a", (5, 6, 7))], Sampling(0.0, 1.0, 4, (), 0)))
        result = {
            "urls": [endpoint.url for endpoint in engine.endpoints],
            "started": len(engine.servers),
            "versions": [completion.weight_version for completion in completions],
            "tokens": [tokens_of(completion) for completion in completions],
        }
    (folder / "answers.tmp").write_text(json.dumps(result))
    (folder / "answers.tmp").rename(folder / "answers.json")


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
