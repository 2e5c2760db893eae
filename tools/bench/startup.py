"""How long a user waits before anything happens: `tools/bench/startup.py [--rounds 5] [--only server ...]`.

    help        `megatron-r1 --help`, to its end
    error       `megatron-r1 grpo` with a key that does not exist, to its end
    first step  `megatron-r1 pretrain model=tiny` on a small corpus, to the first step's row in metrics.jsonl
    server      an SGLang server of the tiny model on the CPU, to its first answer

All take turns, each in processes of their own. Seconds: the median, the least and the most; beside them the target.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.rollout.engine import Request, Sampling, require_completions
from megatron_r1.rollout.sglang.engine import SGLangEngine

TARGETS_S = {"help": 0.5, "error": 1.0, "first step": 15.0, "server": 25.0}
DEADLINE_S = 300.0
PROGRAM = [sys.executable, "-m", "megatron_r1"]
CORPUS = ["data.num_documents=2000", "track=off", "threads=1", "platform=cpu"]


def command_s(arguments: list[str], status: int) -> float:
    """Seconds that a command takes, which must end with `status`."""
    began = time.perf_counter()
    ended = subprocess.run([*PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert ended.returncode == status, f"{arguments} ended with status {ended.returncode}"
    return time.perf_counter() - began


def first_step_s(root: Path) -> float:
    """Seconds until a new run has trained its first step; the run ends then."""
    name = f"run-{time.monotonic_ns()}"
    rows = root / name / "metrics.jsonl"
    began = time.perf_counter()
    arguments = ["pretrain", "model=tiny", f"root='{root}'", f"name={name}", *CORPUS]
    with open(root / f"{name}.log", "wb") as log:
        run = subprocess.Popen([*PROGRAM, *arguments], stdout=log, stderr=log, start_new_session=True)
    try:
        while not (rows.is_file() and rows.stat().st_size):
            assert run.poll() is None and time.perf_counter() - began < DEADLINE_S, (root / f"{name}.log").read_text()
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def write_model(folder: Path) -> None:
    """A folder that SGLang serves, of the tiny model with random weights."""
    from megatron_r1.config.data import DataConfig
    from megatron_r1.config.model import ModelConfig
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
    from megatron_r1.hf.config import generation_config, serving_view, special_tokens
    from megatron_r1.hf.export import write_folder
    from megatron_r1.model.build import build_model, native_tensors
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select
    from megatron_r1.rollout.sync.payload import WeightPayload

    platform, shape, tokenizer = select("cpu"), ModelConfig(), folder / "tokenizer"
    train_tokenizer(DataConfig(num_documents=2000)).save(tokenizer)
    payload, tokens = WeightPayload(shape), special_tokens(tokenizer)
    with process_groups(platform, ParallelConfig(), seed=0, threads=1):
        model = build_model(shape, ParallelConfig(), platform, seed=0)
        named = ((one.name, one.tensor) for one in payload.tensors(native_tensors(model), complete=True))
        written = write_folder(named, folder / "hf", payload.config(tokens), generation_config(tokens), tokenizer)
    serving_view(written, folder / "model")


def server_s(folder: Path) -> float:
    """Seconds until a new server has answered its first request."""
    began = time.perf_counter()
    config = SGLangConfig(servers=1, max_running_requests=16, max_total_tokens=4096)
    with SGLangEngine(folder / "model", config, folder / "logs", "cpu", "float32", context_length=128) as engine:
        require_completions(engine.generate([Request("a", (5, 6, 7))], Sampling(1.0, 1.0, 4, (), 0)))
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TARGETS_S, default=list(TARGETS_S))
    parser.add_argument("--write-model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write_model:
        write_model(given.write_model)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways: dict[str, Callable[[], float]] = {
            "help": partial(command_s, ["--help"], 0),
            "error": partial(command_s, ["grpo", "train.stepz=3"], 2),
            "first step": partial(first_step_s, folder),
            "server": partial(server_s, folder),
        }
        if "server" in given.only:
            # In a process of its own: a trainer's imports and threads are not part of what is measured.
            subprocess.run([sys.executable, __file__, "--write-model", folder], check=True)
        seconds: dict[str, list[float]] = {name: [] for name in given.only}
        for _ in range(given.rounds):
            for name, found in seconds.items():
                found.append(ways[name]())
    for name, found in seconds.items():
        spread = f"({min(found):.2f}-{max(found):.2f})"
        print(f"{name:<11} {statistics.median(found):6.2f} s {spread:<15} target {TARGETS_S[name]:g} s")


if __name__ == "__main__":
    main()
