"""DeepSeek-V3 on 8 to 131,072 GPUs of one kind, as the planner sees it: tools/plan/scale.py [GPU] [--write].

Each line is the fastest layout; the batch is the report's 15,360 sequences throughout. --write keeps the table in
megatron_r1/plan/README.md. The last column is processor time of the search.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import megatron_r1.plan
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.cost import DAY, cost
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.search import search

README = Path(megatron_r1.plan.__file__).with_name("README.md")
BEGIN, END = "<!-- scale: tools/plan/scale.py --write -->\n", "<!-- end of scale -->"
SIZES = (8, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def lines(gpu: str) -> Iterator[str]:
    """The table as Markdown."""
    yield f"| {gpu} | layout | step | tokens/s/GPU | passes | waiting | gradients | failure each | lost | search |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    overrides = ["model=v3_671b", "train.schedule.batch_ramp.tokens=0", f"plan.gpu={gpu}"]
    config = load("pretrain", overrides, "pretrain_v3")
    for gpus in SIZES:
        start = time.process_time()
        found = search(config, "pretrain", gpus, Constants(), Fixed())
        took = f"{time.process_time() - start:.1f} s of {found.tried} layouts"
        if not found.best_first:
            yield f"| {gpus:,} | none fits | | | | | | | | {took} |"
            continue
        best = found.best_first[0]
        assert best.time is not None
        between = config.plan.node_failure_days * DAY / (gpus / GPUS[gpu].per_node)
        lost = cost(best.job.config, "pretrain", gpus, GPUS[gpu].per_node, best.seconds).lost_share
        rate = config.train.global_batch_size * config.train.sequence_length / best.seconds / gpus
        shares = best.time.bubble / best.seconds, best.time.gradients / best.seconds
        yield (
            f"| {gpus:,} | {best.layout} | {best.seconds:.3g} s | {rate:,.0f} | {best.job.micro_batches} "
            f"| {shares[0]:.0%} | {shares[1]:.0%} | {between / 3600:.3g} h | {lost:.1%} | {took} |"
        )


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("--")]
    text = "\n".join(lines((names or ["H100"])[0].upper()))
    print(text)
    if "--write" in sys.argv:
        page = README.read_text()
        before, _, rest = page.partition(BEGIN)
        README.write_text(before + BEGIN + text + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
