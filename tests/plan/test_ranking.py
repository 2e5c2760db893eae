"""Where the published layout stands among all that the search finds."""

from __future__ import annotations

from dataclasses import replace

from megatron_r1.plan.constants import Constants
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.published import ROWS
from megatron_r1.plan.search import TIE, search


def test_the_published_layout_of_v3_on_256_gb200_is_among_the_first() -> None:
    """TP1 PP4 VPP4 EP64 (Megatron-Bridge 26.08): among the first three, or no slower than the best within a tie."""
    row = next(row for row in ROWS if (row.gpu, row.name) == ("GB200", "V3 MXFP8, 26.08"))
    job = row.job()
    free = replace(
        job.config,
        plan=replace(job.config.plan, gpu=row.gpu, imbalance=job.imbalance),
        parallel=replace(job.config.parallel, pipeline_layout=""),
        performance=replace(job.config.performance, overlap_moe_expert_parallel_comm=False),
    )
    kept = Fixed(frozenset({"performance.moe_token_dispatcher_type", "train.micro_batch_size"}))
    found = search(free, "pretrain", row.gpus, Constants(), kept, row.stack)
    order = [one.layout for one in found.best_first]
    place = order.index("TP1 PP4 VPP4 EP64 DP64")
    assert place < 3 or found.best_first[place].seconds < (1 + TIE) * found.best_first[0].seconds
    assert len(order) > 100 and found.best_first[-1].seconds > 2 * found.best_first[0].seconds
