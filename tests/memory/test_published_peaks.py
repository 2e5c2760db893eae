"""Predicted memory of a GPU against published peaks that name their layout."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load
from megatron_r1.memory.trainer import STATES, Pass, job_memory

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


def test_nvidias_qwen3_30b_stays_below_its_published_bound() -> None:
    """The card of qwen3-30b-a3b gives a bound, not a peak: 65 GiB that torch allocates (Megatron-Bridge,
    pretrain_performance.H100). Layout, gradients in bf16, forced balance and no recomputation are those of its recipe,
    and experts' exchange overlaps, as the card says.
    """
    layout = "parallel.expert=16 train.global_batch_size=1024 performance.overlap_moe_expert_parallel_comm=true"
    config = load("pretrain", [*BATCH.split(), "model=qwen3_30b_a3b", *layout.split()])
    (memory,) = job_memory(config, "pretrain", 16, Pass(4096, 64), True)
    allocated = memory.total - memory.of("CUDA and NCCL", "fragmentation") - memory.of("gradients") / 2
    assert 0.9 * 65 < allocated / 2**30 < 65


LENGTHS = (16384, 65536)
RL_PEAKS = {"qwen3_0_6b": (12.528, 19.561)}
"""Model -> GiB at most on one H100, with sequences of each length, of prime-rl's trainer in reinforcement learning
(benchmarks/baselines, rl-full, 1 GPU, "Recompute"): bf16 weights, fp32 gradients, master weights and moments.

Of its other rows: the growth with length is not comparable, because it computes whole layers again (154 kB a token;
594 with what can be computed again here), nor are those of 8 GPUs, whose FSDP gathers layers (10.8 GiB that do not grow
with length for Qwen3-4B, where states alone are 8.4; 79.2 for Qwen3-30B, where they are 64.0), nor LoRA."""


@pytest.mark.parametrize("model", RL_PEAKS)
def test_states_of_one_gpu_are_within_a_twentieth_of_what_does_not_grow_with_length(model: str) -> None:
    (shorter, longer), (small, large) = LENGTHS, RL_PEAKS[model]
    constant = small - (large - small) * shorter / (longer - shorter)
    (memory,) = job_memory(load("grpo", [f"model={model}"]), "grpo", 1, Pass(1, 2), True)
    assert memory.of(*STATES) / 2**30 == pytest.approx(constant, rel=0.05)
