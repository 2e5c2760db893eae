"""What breaks first as GPUs grow to 100,000: tools/plan/what_breaks.py [--write].

Plans DeepSeek-V3 on more and more GPUs, and sets beside each plan what failures, the start of the job and its metrics
cost there. Prints the page; --write keeps it, and the figure of the planner's own time, beside the planner.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron_r1.plan
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.storage import checkpoint_bytes
from megatron_r1.parallel.waiting import HEARTBEAT_S
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.cost import DAY, RESTART_S, least_lost
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.search import PlannedLayout, search

FOLDER = Path(megatron_r1.plan.__file__).parent
PAGE, FIGURE = FOLDER / "WHAT_BREAKS_FIRST.md", FOLDER / "own_time.svg"
SIZES = tuple(1536 * 2**doubling for doubling in range(7))
"""GPUs; 3 x 2^n, so that 98,304 is one of them."""
OWN_SIZES = tuple(2**power for power in range(3, 15))
GPU, BATCH, LENGTH = "H100", 15360, 4096
"""DeepSeek-V3's batch, in sequences, and their length."""
LIMIT = 0.1
"""Share of the time from which on a cause counts as broken."""
CONNECTIONS = 3
"""Connections of a rank to the job's store: of its groups, of its waits and of its heartbeats (parallel/waiting.py)."""
V3 = ("model=v3_671b", f"train.sequence_length={LENGTH}", "train.schedule.batch_ramp.tokens=0", "fp8.enabled=true",
      "performance.overlap_grad_reduce=true", "performance.moe_token_dispatcher_type=hybridep")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grown:
    """A plan on a number of GPUs, and what failures make of it."""

    best: PlannedLayout
    writing: float
    """Seconds of writing a checkpoint."""
    between_failures: float
    """Mean seconds."""

    @property
    def gpus(self) -> int:
        return self.best.job.ranks

    def share(self, part: str) -> float:
        """Of a step."""
        return float(getattr(self.best.time, part)) / self.best.seconds

    def lost(self, background: bool) -> float:
        """Share of the time that failures, and saves against them, take at the interval that costs least."""
        if background:  # a failure also costs what was computed while the last save was written
            shortest = max(self.writing, self.best.seconds)
            return least_lost(0.0, self.between_failures, RESTART_S + self.writing, shortest)[1]
        return least_lost(self.writing, self.between_failures, RESTART_S, self.best.seconds)[1]

    def tokens_per_gpu(self) -> float:
        """Tokens a second on each GPU, without what failures cost."""
        train = self.best.job.config.train
        return train.global_batch_size * train.sequence_length / self.best.seconds / self.gpus


def faster(plan: Grown, restart: float) -> float:
    """Share of the time lost with saves in the background and storage ten times as fast."""
    writing = plan.writing / 10
    return least_lost(0.0, plan.between_failures, restart + writing, writing)[1]


def grown(gpus: int, batch: int = BATCH) -> Grown:
    """The best layout on this many GPUs."""
    config = _config(GPU, batch)
    best = search(config, "pretrain", gpus, Constants(), Fixed(frozenset({"train.global_batch_size"}))).best_first[0]
    plan = config.plan
    writing = checkpoint_bytes(config, "pretrain") / (plan.storage_gb_per_second * 1e9)
    return Grown(best, writing, plan.node_failure_days * DAY / (gpus / GPUS[GPU].per_node))


def _config(gpu: str, batch: int, model: Sequence[str] = V3) -> RunConfig:
    return load("pretrain", [*model, f"plan.gpu={gpu}", f"train.global_batch_size={batch}"])


def first_broken(plans: Sequence[Grown], share: Callable[[Grown], float]) -> int | None:
    """GPUs of the first plan in which a cause takes more than `LIMIT` of the time."""
    return next((plan.gpus for plan in plans if share(plan) > LIMIT), None)


@dataclass(frozen=True, slots=True)
class Start:
    """What is measured here of a job's start and of its log steps."""

    groups: dict[int, tuple[int, float]]
    """GPUs -> number of process groups, and each rank's seconds of creating them."""
    store_rate: float
    """Additions a second to a store."""
    log_step: dict[int, float]
    """GPUs -> each rank's seconds of comparing the times of all ranks."""


CAUSES: tuple[tuple[str, Callable[[Grown], float]], ...] = (
    ("failures, where training stops for a checkpoint", lambda plan: plan.lost(background=False)),
    ("failures, where checkpoints are written in the background", lambda plan: plan.lost(background=True)),
    ("waiting in the pipeline, at an unchanged batch", lambda plan: plan.share("bubble")),
    ("gradients and weights between ranks, at an unchanged batch", lambda plan: plan.share("gradients")),
)


def group_creation(gpus: int, pipeline: int = 8, expert: int = 64) -> tuple[int, float]:
    """Number of process groups that each rank creates, and its processor seconds, on a backend that sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_r1.platform import select

    select("cpu")
    from megatron.core import parallel_state

    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    calls, new_group = 0, dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return new_group(*args, **kwargs)

    begin = time.process_time()
    try:
        with patch.object(dist, "new_group", counted):
            parallel_state.initialize_model_parallel(
                pipeline_model_parallel_size=pipeline,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
        return calls, time.process_time() - begin
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def log_step_seconds(gpus: int) -> float:
    """Processor seconds in which each rank compares the times of all ranks, which are made up here, at a log step."""
    from megatron_r1.train.hooks.rank_times import RankTimes, metrics_over_ranks, slow_ranks

    ranks = [RankTimes(rank % 8, {"update": 1.0}, {"update": 1.0 + rank % 7 / 70}) for rank in range(gpus)]
    begin = time.process_time()
    slow_ranks(ranks, 0.7)
    dict(metrics_over_ranks(ranks, 10))
    return time.process_time() - begin


def exponent(points: dict[int, float]) -> float:
    """Of the power of GPUs with which seconds grow, between the first and the last point."""
    (first, low), *_, (last, high) = points.items()
    return math.log(high / low) / math.log(last / first)


def store_rate(seconds: float = 1.0) -> float:
    """Additions a second that one client gets from a store on this machine."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    begin, additions = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(100):
            store.add("key", 1)
        additions += 100
    return additions / (time.perf_counter() - begin)


def own_seconds(sizes: Iterable[int]) -> dict[str, dict[int, float]]:
    """Processor seconds of the planner's search: model -> GPUs -> seconds."""
    models = {"v3_671b": V3, "moonlight_16b": ("model=moonlight_16b", f"train.sequence_length={LENGTH}")}
    found: dict[str, dict[int, float]] = {}
    for name, overrides in models.items():
        config = _config(GPU, 16384, overrides)
        for gpus in sizes:
            begin = time.process_time()
            search(config, "pretrain", gpus, Constants(), Fixed(frozenset({"train.global_batch_size"})))
            found.setdefault(name, {})[gpus] = time.process_time() - begin
            print(f"{name} on {gpus} GPUs: {found[name][gpus]:.2f} s", file=sys.stderr)
    return found


def page(plans: Sequence[Grown], larger: Grown, start: Start) -> str:
    """The page."""
    last, power = plans[-1], exponent(start.log_step)
    measured, slowest = [*start.log_step.items()][-1]
    order = sorted(((first_broken(plans, share) or 10**9, text, share(last)) for text, share in CAUSES))
    listed = [
        f"{number}. **{text}**: {f'above {LIMIT:.0%} from {gpus:,} GPUs on' if gpus < 10**9 else 'below 10 %'}, "
        f"{at_last:.0%} at {last.gpus:,}."
        for number, (gpus, text, at_last) in enumerate(order, 1)
    ]
    tokens = larger.best.job.config.train.global_batch_size * LENGTH
    return "\n".join([
        "# What breaks first at 100,000 GPUs",
        "",
        f"`tools/plan/what_breaks.py --write` computed this page with the planner: `v3_671b` in FP8 on {GPU}, "
        f"{BATCH:,} sequences of {LENGTH:,} tokens a step at every size (DeepSeek-V3's batch). A node fails every "
        f"{last.best.job.config.plan.node_failure_days:g} days (Llama 3), a restart takes {RESTART_S:.0f} s, all nodes "
        f"together write {last.best.job.config.plan.storage_gb_per_second:g} GB/s. The model is held against published "
        "steps of at most 8,192 GPUs; beyond, and in congestion, stragglers and power, this is an extrapolation.",
        "",
        "In the order in which they take a tenth of the time:",
        "",
        *listed,
        "",
        "| GPUs | best layout | step (s) | tokens/s/GPU | experts' exchange | pipeline | gradients | minutes between "
        "failures | lost where saving stops training | in the background |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {plan.gpus:,} | {plan.best.layout} | {plan.best.seconds:.3g} | {plan.tokens_per_gpu():,.0f} | "
            f"{plan.share('exchange'):.0%} | {plan.share('bubble'):.0%} | {plan.share('gradients'):.0%} | "
            f"{plan.between_failures / 60:,.0f} | {plan.lost(False):.0%} | {plan.lost(True):.0%} |"
            for plan in plans
        ),
        "",
        f"- **Checkpoints.** One takes {last.writing:.0f} s to write, and at {last.gpus:,} GPUs a node fails every "
        f"{last.between_failures / 60:.0f} minutes. Saving in the background (`train.async_save=true`) is not enough: "
        f"storage ten times as fast leaves {faster(last, RESTART_S):.0%} "
        f"lost, nearly all of it the restart itself; a restart of 60 s then leaves "
        f"{faster(last, 60.0):.0%}.",
        f"- **Batch.** With an unchanged batch a GPU of {last.gpus:,} does "
        f"{last.tokens_per_gpu() / plans[0].tokens_per_gpu():.0%} of what one of {plans[0].gpus:,} does. A batch that "
        f"grows with the GPUs keeps {larger.tokens_per_gpu() / plans[0].tokens_per_gpu():.0%} ({larger.best.layout}), "
        f"with {tokens / 1e9:.1f} billion tokens a step: DeepSeek-V3's 14.8 trillion would be "
        f"{14.8e12 / tokens:,.0f} steps. Whether a model learns as well from so few is not the planner's to say.",
        f"- **Experts.** {last.best.job.config.model.moe.num_experts} experts bound expert parallelism; a token's "
        "traffic does not grow with the cluster, so the exchange grows only as small batches force other layouts. "
        "Congestion between so many nodes is not in the model.",
        "- **Start.** Every rank creates every process group of the job, its own or not, one after the other. The "
        f"store of the job's ranks is one process on the first node, with {CONNECTIONS} connections of each rank and a "
        f"heartbeat every {HEARTBEAT_S:.0f} s. One client of the machine that computed this page gets "
        f"{start.store_rate:,.0f} additions a second from such a store, so what breaks is the limit on open files, "
        "which must be above the connections.",
        "",
        "| GPUs (PP8 EP64) | process groups | seconds of each rank | connections to the store | heartbeats a second |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {gpus:,} | {number:,} | {seconds:.1f} | {CONNECTIONS * gpus:,} | {gpus / HEARTBEAT_S:,.0f} |"
            for gpus, (number, seconds) in start.groups.items()
        ),
        "",
        "- **Metrics.** A step's numbers are one sum over all ranks of a few hundred bytes, which does not grow. At "
        "log steps every rank compares the times of all ranks, which takes "
        + ", ".join(f"{seconds:.2g} s with {gpus:,}" for gpus, seconds in start.log_step.items())
        + f" (processor seconds here) and grows with GPUs to the power of {power:.1f}: about "
        f"{slowest * (last.gpus / measured) ** power:,.2g} s with {last.gpus:,}.",
        "",
        "The planner's own time, in processor seconds of its search on one core:",
        "",
        f"![processor seconds of a search from {OWN_SIZES[0]} to {OWN_SIZES[-1]:,} GPUs]({FIGURE.name})",
        "",
    ])  # fmt: skip


def draw(seconds: dict[str, dict[int, float]], path: Path) -> None:
    """The figure of the planner's own time."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in seconds.items():
        axes.plot([*points], [*points.values()], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(OWN_SIZES, [f"{gpus:,}" for gpus in OWN_SIZES], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs that are planned for")
    axes.set_ylabel("search (processor seconds)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_r1"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Compute, print, and keep with --write."""
    plans = [grown(gpus) for gpus in SIZES]
    larger = grown(SIZES[-1], BATCH * SIZES[-1] // SIZES[0])
    groups = {gpus: group_creation(gpus) for gpus in SIZES[::2]}
    log_step = {gpus: log_step_seconds(gpus) for gpus in SIZES[:3]}
    text = page(plans, larger, Start(groups, store_rate(), log_step))
    print(text)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        draw(own_seconds(OWN_SIZES), FIGURE)


if __name__ == "__main__":
    main()
