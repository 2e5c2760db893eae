"""Where published layouts stand among all that the search finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.plan.constants import Constants
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.published import ROWS
from megatron_r1.plan.search import TIE, Found, search


def found_beside(gpu: str, name: str, fixed: tuple[str, ...] = ()) -> Found:
    """What the search finds on the GPUs of a published row, with its software and its micro-batches."""
    row = next(row for row in ROWS if (row.gpu, row.name) == (gpu, name))
    job = row.job()
    free = replace(
        job.config,
        plan=replace(job.config.plan, gpu=row.gpu, imbalance=job.imbalance),
        parallel=replace(job.config.parallel, pipeline_layout=""),
        performance=replace(job.config.performance, overlap_moe_expert_parallel_comm=False),
    )
    kept = Fixed(frozenset({"performance.moe_token_dispatcher_type", "train.micro_batch_size", *fixed}))
    return search(free, "pretrain", row.gpus, Constants(), kept, row.stack)


@pytest.mark.parametrize(
    ("gpu", "name", "layout", "behind"),
    [
        ("GB200", "V3 MXFP8, 26.08", "TP1 PP4 VPP4 EP64 DP64", TIE),
        ("GB300", "V3 MXFP8, 26.08", "TP1 PP2 VPP8 EP32 DP128", 0.035),
        ("H800", "DeepSeek-V3, its own step", "TP1 PP16 EP64 DP128", 0.0),
        ("H100", "V3 BF16, card", "TP2 PP8 VPP4 EP64 DP64", 0.08),
    ],
)
def test_the_published_layout_of_v3_is_among_the_first(gpu: str, name: str, layout: str, behind: float) -> None:
    """Among the first three, or behind the best by no more than README.md says."""
    fixed = ("parallel.virtual_pipeline",) if gpu == "H800" else ()  # DualPipe's ranks have one chunk a direction
    found = found_beside(gpu, name, fixed)
    order = [one.layout for one in found.best_first]
    place = order.index(layout)
    slower = found.best_first[place].seconds / found.best_first[0].seconds - 1
    print(f"{gpu} {layout}: place {place + 1} of {len(order)}, {slower:.1%} behind {order[0]}")
    assert place < 3 or slower < behind
    assert len(order) > 80 and found.best_first[-1].seconds > 1.5 * found.best_first[0].seconds
