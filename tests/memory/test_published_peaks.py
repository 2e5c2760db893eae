"""Predicted memory of a GPU against published peaks that name their layout."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load
from megatron_r1.memory.trainer import Pass, job_memory

BATCH = "train.sequence_length=4096 train.micro_batch_size=1 train.global_batch_size=32"
V2, V3 = (
    f"model={model} model.num_layers=4 model.moe.first_dense_layers=1 model.mtp.num_layers=0"
    for model in ("v2_236b", "v3_671b")
)
LLAMA = "model=llama3_3_70b model.num_layers=12"
PEAKS = [
    (f"{V3} parallel.expert=8", [104.30]),
    (f"{V3} parallel.expert=4 parallel.pipeline=2", [71.24, 114.00]),
    (f"{V2} parallel.expert=8", [45.63]),
    (f"{V2} parallel.expert=4 parallel.pipeline=2", [31.59, 44.70]),
    (f"{LLAMA} parallel.pipeline=2", [66.55, 62.97]),
    (f"{LLAMA} parallel.tensor=2", [60.68]),
    (f"{LLAMA} parallel.tensor=4", [39.07]),
    (f"{LLAMA} parallel.tensor=8", [28.29]),
]
"""Layout on 8 B200 -> GiB that torch allocated at most, on the first and on the last stage (SimuMax 1.2,
docs/b200/b200_release_v1.2_summary.json: Megatron-LM, BF16, micro-batches of one sequence, no recomputation)."""


@pytest.mark.parametrize(("layout", "peaks"), PEAKS)
def test_predicted_tensors_are_within_a_twentieth_of_published_peaks(layout: str, peaks: list[float]) -> None:
    config = load("pretrain", [*BATCH.split(), *layout.split()])
    stages = job_memory(config, "pretrain", 8, Pass(4096, 4), True)
    assert len(stages) == len(peaks)
    for stage, peak in zip(stages, peaks, strict=True):
        allocated = stage.total - stage.parts["CUDA and NCCL"] - stage.parts["fragmentation"]
        assert allocated / 2**30 == pytest.approx(peak, rel=0.05), stage.text()


def test_what_the_allocator_reserves_is_near_the_published_amount() -> None:
    """118.61 GiB were reserved of the last layout's second stage, and 110.18 GiB of the first layout."""
    for layout, reserved in ((PEAKS[0][0], 110.18), (PEAKS[1][0], 118.61)):
        config = load("pretrain", [*BATCH.split(), *layout.split()])
        fullest = max(job_memory(config, "pretrain", 8, Pass(4096, 4), True), key=lambda stage: stage.total)
        assert (fullest.total - fullest.parts["CUDA and NCCL"]) / 2**30 == pytest.approx(reserved, rel=0.05)
