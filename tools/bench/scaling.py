"""How training's cost grows: tokens/s at one and two ranks; seconds as layers, experts, sequence and group size double.

    python tools/bench/scaling.py FOLDER [--rounds 5] [--doublings 3] [--only ranks|costs]

Two ranks share the same global batch, by data and by tensor parallelism, one thread each. Costs are of a model of
`tiny`'s widths on one thread: of a pre-training step for layers, experts and sequence, and of learning from a rollout
for the group size. An exponent is the slope of a line through the logarithms: 1 where cost and size double together.
FOLDER gets `scaling.png` and `scaling.json`. Sizes of one axis take turns within a round, as do numbers of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_r1.config.load import load
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from tools.bench.comparison import alternate, describe, seconds_of

BATCH, LENGTH = 16, 64
PROMPTS = 4
LEARNING_RATE = 1e-3
RANKS = {"1 rank": (1, 1), "2 ranks, data": (2, 1), "2 ranks, tensor": (2, 2)}
"""Ranks, and degree of tensor parallelism."""
SMALLEST = {"layers": 2, "experts": 8, "sequence": 64, "group": 8}
AXES = tuple(SMALLEST)


class Growth(NamedTuple):
    """What an axis costs."""

    sizes: list[int]
    seconds: list[float]
    """Median of each size."""

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log size."""
        return float(np.polyfit(np.log2(self.sizes), np.log2(self.seconds), 1)[0])

    @property
    def last_exponent(self) -> float:
        """Of the last doubling alone, where fixed costs weigh least."""
        return math.log2(self.seconds[-1] / self.seconds[-2])


def config_of(axis: str = "layers", size: int | None = None, tensor: int = 1) -> RunConfig:
    """The run whose step is measured: `tiny` in fp32, with one axis of another size."""
    size = SMALLEST[axis] if size is None else size
    overrides = {
        "layers": [f"model.num_layers={size}"],
        "experts": [f"model.moe.num_experts={size}"],
        "sequence": [
            f"model.max_sequence_length={max(size, 256)}",
            f"model.rope.original_max_position={max(size, 256)}",
        ],
        "group": [f"rl.group_size={size}", f"rl.prompts_per_rollout={PROMPTS}", "rl.kl_coefficient=0"],
    }[axis]
    return load("grpo" if axis == "group" else "pretrain", [*overrides, f"parallel.tensor={tensor}"])


def pretraining_step(config: RunConfig, platform: Any, length: int = LENGTH) -> Callable[[], object]:
    """A step on this data-parallel rank's share of a drawn batch."""
    import torch.distributed as dist

    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.routing import pretraining_policy
    from megatron_r1.train.stream import StreamReader
    from megatron_r1.train.update import update

    model = build_model(config.model, config.parallel, platform, seed=0)
    optimizer, reader, group = Optimizer(model, config.train), StreamReader("cpu"), data_parallel_group()
    pretraining_policy(config).apply(model, 0)
    tokens_BL = np.random.default_rng(0).integers(0, config.model.vocab_size, (BATCH, length + 1))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    size = BATCH // ranks

    def step() -> None:
        micro_batches = reader.micro_batches(tokens_BL, rank, ranks, size)
        update(model, optimizer, micro_batches, reader.forward, LEARNING_RATE, length, size)

    return step


def learning_step(config: RunConfig, platform: Any) -> Callable[[], object]:
    """Learning from a drawn rollout: old log-probs are the engine's, updates as many as the recipe has."""
    from megatron_r1.model.build import build_model
    from megatron_r1.model.names import in_multi_token_layer
    from megatron_r1.rl.learner import Learner
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.state import TrainState

    model = build_model(config.model, config.parallel, platform, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not in_multi_token_layer(name))
    learner = Learner(config, model, Optimizer(model, config.train), None, 0, platform.device)
    samples = drawn_samples(config.rl.group_size, config.model.vocab_size)
    return lambda: learner.learn(samples, TrainState())


def drawn_samples(group_size: int, vocab_size: int) -> list[Any]:
    """Responses of 8 to 64 tokens to prompts of 8 to 24."""
    from megatron_r1.rollout.engine import Response
    from megatron_r1.rollout.sample import Sample

    chance = np.random.default_rng(0)

    def tokens(least: int, most: int) -> np.ndarray:
        return chance.integers(0, vocab_size, chance.integers(least, most), dtype=np.int32)

    samples = []
    for group in range(PROMPTS):
        prompt = tokens(8, 24)
        for _ in range(group_size):
            drawn, reward = tokens(8, 64), float(chance.integers(0, 2))
            logprobs = -6 - chance.random(len(drawn), dtype=np.float32)
            samples.append(
                Sample(
                    prompt_id=str(group), group=group, prompt_length=len(prompt), response_length=len(drawn),
                    weight_version="0", finish_reason="stop", reward=reward, reward_parts={"accuracy": reward},
                    response=Response(prompt, drawn, logprobs),
                )
            )  # fmt: skip
    return samples


def growth_of(axis: str, doublings: int, rounds: int, platform: Any) -> Growth:
    """Seconds of one step at each size, by turns."""
    sizes = [SMALLEST[axis] * 2**power for power in range(doublings + 1)]
    steps = {}
    for size in sizes:
        config = config_of(axis, size)
        if axis == "group":
            steps[str(size)] = learning_step(config, platform)
        else:
            steps[str(size)] = pretraining_step(config, platform, size if axis == "sequence" else LENGTH)
    found = alternate({name: seconds_of(step) for name, step in steps.items()}, rounds)
    return Growth(sizes, [statistics.median(found[str(size)]) for size in sizes])


def costs(doublings: int, rounds: int) -> dict[str, Growth]:
    """Each axis, in this process."""
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    platform = select("cpu")
    with process_groups(platform, ParallelConfig(), seed=0, threads=1):
        found = {axis: growth_of(axis, doublings, rounds, platform) for axis in AXES}
    for axis, growth in found.items():
        steps = ", ".join(f"{size}: {seconds:.3g} s" for size, seconds in zip(*growth, strict=True))
        print(f"{axis}: {steps}; exponent {growth.exponent:.2f}, of the last doubling {growth.last_exponent:.2f}")
    return found


def ranks_seconds(ranks: int, tensor: int) -> float:
    """Median seconds of a step by ranks of their own processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(Path(__file__).resolve()), "-", f"--as-rank={tensor}"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.rpartition("seconds ")[2].split()[0])


def as_rank(tensor: int, rounds: int) -> None:
    """A rank started by `ranks_seconds`; rank 0 prints the median of its steps."""
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select
    from megatron_r1.platform.launcher import is_rank_zero

    platform, config = select("cpu"), config_of(tensor=tensor)
    with process_groups(platform, config.parallel, seed=0, threads=1):
        found = alternate({"step": seconds_of(pretraining_step(config, platform))}, rounds, warm_up=3)
        if is_rank_zero():
            print(f"seconds {statistics.median(found['step'])}")


def ranks_speed(rounds: int) -> dict[str, float]:
    """Tokens/s of each number of ranks."""
    ways = {name: partial(ranks_seconds, *numbers) for name, numbers in RANKS.items()}
    found = alternate(ways, rounds, warm_up=0)
    print(describe(found, base="1 rank", work=BATCH * LENGTH, unit="tokens"))
    return {name: BATCH * LENGTH / statistics.median(seconds) for name, seconds in found.items()}


def draw(growths: dict[str, Growth], path: Path) -> None:
    """Seconds over those of the smallest size, by how many times as large it is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for axis, growth in growths.items():
        factors = [size / growth.sizes[0] for size in growth.sizes]
        ratios = [seconds / growth.seconds[0] for seconds in growth.seconds]
        axes.plot(factors, ratios, "o-", label=f"{axis} from {growth.sizes[0]}: exponent {growth.exponent:.2f}")
    axes.plot(factors, factors, ":", color="grey", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="times as large", ylabel="seconds of a step, times as many")
    for side in (axes.xaxis, axes.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    axes.set_xticks(factors)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the figure and the numbers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--only", choices=("ranks", "costs"))
    parser.add_argument("--as-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    given = parsed()
    if given.as_rank:
        as_rank(given.as_rank, rounds=10)
        return
    started, found = time.perf_counter(), dict[str, Any]()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.only != "costs":
        found["tokens_per_second"] = ranks_speed(given.rounds)
    if given.only != "ranks":
        growths = costs(given.doublings, given.rounds)
        draw(growths, given.folder / "scaling.png")
        found["costs"] = {axis: {**growth._asdict(), "exponent": growth.exponent} for axis, growth in growths.items()}
    (given.folder / "scaling.json").write_text(json.dumps(found, indent=1))
    print(f"written to {given.folder} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
