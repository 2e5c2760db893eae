"""The way of a rollout's data through a step, without a model: seconds of each part and peak memory of each rank.

    python tools/bench/rollout_path.py --responses 512 2048 8192 --longest 8192 32768 --ranks 1 2 4
    python tools/bench/rollout_path.py --responses 8192 --longest 32768 --ranks 2 --share 40

Lengths are drawn: uniformly from 1 to the longest, or all the longest with --full. Groups of 16 share a prompt of 200
tokens; a token has four characters of text. Rank 0 does the parts of a step in turn, the others those that they have:

    replies        SGLang's replies, as orjson parses them, become samples; servers still generate meanwhile
    check          the part of it that checks tokens and log-probs, measured alone
    journal, read  the samples become a file that is on the disk; the file becomes samples, as when a run resumes
    send           what all ranks know to all of them, and to each its share of the responses
    batches        a rank's share becomes its micro-batches, of 65,536 tokens

Every rank compares what it got with what was drawn. With --share N rank 0 sends the shares of N data-parallel ranks, to
rank 1 all of them, which keeps that of the second: rank 0 does what it does for N ranks, rank 1 what one of them does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.platform.ports import reserve_ports
from megatron_r1.rewards.score import Score

GROUP, PROMPT_TOKENS, VOCABULARY, CHARACTERS = 16, 200, 129_280, 4
PROMPT = Prompt("train-0", "?", "0", "", "number")
TOKENS_PER_MICRO_BATCH = 65_536


class Drawn:
    """The responses of a rollout, each of which can be drawn by itself."""

    def __init__(self, given: argparse.Namespace):
        draw = np.random.default_rng(given.seed)
        self.lengths = draw.integers(1, given.longest + 1, given.responses)
        if given.full:
            self.lengths[:] = given.longest
        self.seed, self.longest, self.text = given.seed, given.longest, "abc " * given.longest
        assert CHARACTERS * given.longest == len(self.text)

    def prompt(self, index: int) -> np.ndarray:
        draw = np.random.default_rng((self.seed, 1, index // GROUP))
        return draw.integers(0, VOCABULARY, PROMPT_TOKENS, np.int32)

    def response(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs."""
        draw, length = np.random.default_rng((self.seed, 2, index)), self.lengths[index]
        return draw.integers(0, VOCABULARY, length, np.int32), -draw.random(length, np.float32)


class Parts:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def samples_of(drawn: Drawn, parts: Parts) -> list[Any]:
    """What the engine's replies become."""
    from megatron_r1.rl.generation.rollouts import scored_sample
    from megatron_r1.rollout.engine import Request, Response, Sampling
    from megatron_r1.rollout.sglang.replies import parse_completion

    sampling, samples = Sampling(1.0, 1.0, drawn.longest, (), 0), []
    for index in range(len(drawn.lengths)):
        tokens, logprobs = (numbers.tolist() for numbers in drawn.response(index))
        prompt = tuple(drawn.prompt(index).tolist())
        finish = {"type": "stop", "matched": tokens[-1]}
        pairs = [[logprob, token, None] for token, logprob in zip(tokens, logprobs, strict=True)]
        meta = {"id": "0", "prompt_tokens": len(prompt), "weight_version": "0", "finish_reason": finish}
        reply = {"output_ids": tokens, "meta_info": {**meta, "output_token_logprobs": pairs}}
        request, text = Request(str(index), prompt), drawn.text[: CHARACTERS * len(tokens)]
        with parts.timed("replies"):
            completion = parse_completion(reply, request, sampling, {"0"}, "0")
            score = Score(float(index % 2), {"accuracy": float(index % 2)})
            samples.append(scored_sample(index // GROUP, PROMPT, completion, text, score, lambda _: ""))
        with parts.timed("check"):
            Response(completion.response.prompt_tokens, completion.response.tokens, completion.response.logprobs)
    return samples


def step(given: argparse.Namespace, rank: int, parts: Parts) -> None:
    """One step's data path on this rank."""
    from megatron_r1.parallel import comm
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.rl.generation.rollouts import Rollout
    from megatron_r1.rl.learner import plan_mini_batches, shares_of
    from megatron_r1.rl.loop import scatter_responses
    from megatron_r1.rl.policy.batch import make_batch
    from megatron_r1.rollout.journal import FlatResponses, Journal
    from megatron_r1.rollout.sample import response_of

    config, drawn, rollout = RunConfig(), Drawn(given), Rollout([], {})
    config.rl.tokens_per_micro_batch = TOKENS_PER_MICRO_BATCH
    if rank == 0:
        rollout = Rollout(samples_of(drawn, parts), {})
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            journal = Journal(Path(folder))
            with parts.timed("journal"):
                journal.write(1, rollout.samples)
            if given.ranks == 1:
                rollout = Rollout([], {})  # a run reads a rollout or samples it
                with parts.timed("read"):
                    rollout = Rollout(journal.read(1) or [], {})
    ranks = given.share or given.ranks
    comm.barrier()
    with parts.timed("send"):
        known = comm.broadcast(rollout.without_responses() if rank == 0 and ranks > 1 else rollout)
        rollout = rollout if rank == 0 else known
        plans = plan_mini_batches(config, rollout.samples, 0, ranks)
        shares, group = shares_of(plans, ranks), data_parallel_group()
        for other in range(2, given.share):

            def of_other(_: int, other: int = other) -> FlatResponses:
                return FlatResponses.of([response_of(rollout.samples[index]) for index in shares[other]])

            comm.scatter_arrays(of_other if rank == 0 else None, group)
        if ranks > 1:
            rollout = scatter_responses(rollout, shares)
        comm.barrier()
    with parts.timed("batches"):
        mine = [batch for plan in plans for batch in plan.micro_batches[rank]]
        batches = [make_batch(rollout.samples, batch, 0, "cpu") for batch in mine]
    del batches
    for index in shares[rank]:
        tokens, logprobs = drawn.response(index)
        found = response_of(rollout.samples[index])
        assert np.array_equal(found.tokens, tokens) and np.array_equal(found.logprobs, logprobs)
        assert np.array_equal(found.prompt_tokens, drawn.prompt(index))
    assert ranks == 1 or sum(sample.response is not None for sample in rollout.samples) == len(shares[rank])


def on_rank(given: argparse.Namespace, rank: int, port: int, queue: Any) -> None:
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"
    os.environ |= dict(zip(names, map(str, (rank, rank, given.ranks, given.ranks, port)), strict=True))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    parts = Parts()
    with process_groups(select("cpu"), ParallelConfig(), seed=0, threads=1):
        step(given, rank, parts)
    peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # noqa: SIM115
    queue.put((rank, parts.seconds, int(peak_kb) / 2**20))


def measure(given: argparse.Namespace) -> list[tuple[int, dict[str, float], float]]:
    """Seconds by part and peak GB of each rank."""
    [port] = reserve_ports(1)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=on_rank, args=(given, rank, port, queue)) for rank in range(given.ranks)]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) and queue.qsize() < given.ranks:
            time.sleep(0.1)
            if any(process.exitcode for process in processes):
                raise RuntimeError("a rank failed")
        return sorted(queue.get() for _ in processes)
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=[512])
    parser.add_argument("--longest", type=int, nargs="+", default=[8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--full", action="store_true", help="all responses have the longest length")
    parser.add_argument("--share", type=int, default=0, help="data-parallel ranks that rank 0 sends to, on 2 ranks")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the journal; the system's folder of temporary files without it")
    given = parser.parse_args()
    for responses in given.responses:
        for longest in given.longest:
            for ranks in given.ranks:
                case = argparse.Namespace(**{**vars(given), "responses": responses, "longest": longest, "ranks": ranks})
                rounds = [measure(case) for _ in range(given.rounds)]
                tokens = int(Drawn(case).lengths.sum())
                print(f"{responses} responses, longest {longest}, {tokens:,} tokens, {ranks} ranks")
                for rank, seconds, _ in rounds[0]:
                    parts = {name: statistics.median(found[rank][1][name] for found in rounds) for name in seconds}
                    told = ", ".join(f"{name} {found:.2f}" for name, found in parts.items())
                    peak = max(found[rank][2] for found in rounds)
                    print(f"  rank {rank}: {told} s; peak {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
