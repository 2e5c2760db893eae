"""Counted work against independent sums: FLOPs of the model, bytes of the exchange."""

from __future__ import annotations

import pytest

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.exchange import domains_of_token, exchange_seconds, traffic
from megatron_r1.plan.job import Stack, TrainingJob
from megatron_r1.plan.step import count, step_time

V3 = ["model=v3_671b", "train.sequence_length=4096", "train.micro_batch_size=1", "train.global_batch_size=64"]


def flops(overrides: list[str], ranks: int) -> float:
    """Forward and backward FLOPs of a step, over all ranks."""
    config = load("pretrain", [*V3, *overrides])
    counted = count(TrainingJob(config, GPUS["H800"], ranks))
    total = 0.0
    for rank in counted.ranks:
        for number in rank:
            work = counted.chunks[number]
            for one in (work.forward, work.backward_input, work.backward_weight):
                total += one.bf16 + one.fp8 + one.scores_bf16 + one.scores_fp8
    job = counted.job
    share = job.config.parallel.tensor * job.config.parallel.context
    return total * share * job.micro_batches * job.data_parallel


@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"], ["parallel.pipeline=16", "parallel.expert=64"],
                                    ["fp8.enabled=true"], ["parallel.context=2"]])  # fmt: skip
def test_flops_are_those_of_deepseeks_accounting(layout: list[str]) -> None:
    """6 N + causal attention of 61 layers, and 5 / 6 of it more for scores that the backward pass repeats."""
    ranks = 1024 if "parallel.pipeline=16" in layout else 64
    tokens, activated, scores = 64 * 4096, 36_625_603_584, 3 * 61 * 4096 * 128 * 320
    multi_token = 1.61e9 + 0.927e9 * 0  # its output head is that of the model, which is counted twice
    expected = tokens * (6 * activated + scores * 3.5 / 3)
    more = tokens * (6 * (multi_token) + scores / 61 * 3.5 / 3)
    assert flops(["model.mtp.num_layers=0", *layout], ranks) == pytest.approx(expected, rel=0.01)
    assert flops(layout, ranks) == pytest.approx(expected + more, rel=0.01)


def test_a_token_visits_as_many_nodes_as_group_limited_routing_allows() -> None:
    moe = load("pretrain", V3).model.moe
    assert domains_of_token(moe, 8) == 4
    assert domains_of_token(moe, 1) == 1
    # 4 of 8 groups, two on each of 4 nodes: a node has none of them with probability C(6,4)/C(8,4).
    assert domains_of_token(moe, 4) == pytest.approx(4 * (1 - 15 / 70))
    plain = load("pretrain", ["model=qwen3_30b_a3b"]).model.moe
    assert domains_of_token(plain, 2) == pytest.approx(2 * (1 - 0.5**8))


def test_experts_in_one_nvlink_domain_use_no_network() -> None:
    config = load("pretrain", [*V3, "parallel.expert=32", "performance.moe_token_dispatcher_type=deepep"])
    assert traffic(config, GPUS["GB200"]).network == 0 and traffic(config, GPUS["GB200"]).nvlink > 6
    far = traffic(config, GPUS["H100"])
    assert far.network == pytest.approx(domains_of_token(config.model.moe, 4) * 3 / 4)
    assert traffic(config, GPUS["H100"], fp8_dispatch=True).element < far.element
    every = load("pretrain", [*V3, "parallel.expert=32"])
    assert traffic(every, GPUS["H100"]).network == 8 * 3 / 4


@pytest.mark.parametrize(
    ("gpu", "far", "near", "element", "milliseconds"),
    [("H800", 0.0, 4.60, 1, 1.04), ("H800", 0.99, 5.65, 1, 1.41), ("H800", 3.0, 6.28, 1, 2.09),
     ("H800", 3.5, 6.60, 1, 2.37), ("H100", 0.99, 5.65, 2, 1.75), ("H100", 2.70, 6.28, 2, 3.67),
     ("H100", 4.59, 6.60, 2, 6.17)],
)  # fmt: skip
def test_an_exchange_takes_as_long_as_its_kernels_authors_measured(
    gpu: str, far: float, near: float, element: int, milliseconds: float
) -> None:
    """4,096 tokens of 7,168: DeepEP on H800 with 8, 16, 32, 64 ranks; Hybrid-EP on H100 with 16, 32, 64 (exchange.py).

    `far` and `near` copies of a token leave the node and the GPU.
    """
    each = 4096 * 7168 * (1 + 4 / 128 if element == 1 else 2)
    found = exchange_seconds(far * each, near * each, GPUS[gpu])
    assert 1e3 * found == pytest.approx(milliseconds, rel=0.13)


def test_graphs_even_routing_and_faster_links_shorten_a_step() -> None:
    config = load("pretrain", [*V3, "parallel.expert=8"])

    def step(gpu: str = "H800", imbalance: float = 1.1, **stack: float) -> float:
        job = TrainingJob(config, GPUS[gpu], 64, imbalance, Stack(**stack))  # type: ignore[arg-type]
        return step_time(count(job), Constants()).total

    assert step(cuda_graphs=1.0) <= step() and step(imbalance=1.0) < step() and step(older=True) > step()
    assert step("GB300") < step("H100") < step("H800")


def test_a_bubble_is_that_of_the_closed_formula() -> None:
    """(PP - 1) (F + B) / VP, of the rank that has most to do."""
    parts = {}
    for virtual in (1, 2):
        config = load("pretrain", ["model=moonlight_16b", "train.sequence_length=4096", "train.global_batch_size=64",
                                   "train.micro_batch_size=1", "model.num_layers=24", "parallel.pipeline=4",
                                   f"parallel.virtual_pipeline={virtual}"])  # fmt: skip
        parts[virtual] = step_time(count(TrainingJob(config, GPUS["GB300"], 4)), Constants())
    one = parts[1]
    assert one.bubble == pytest.approx(3 * (one.compute + one.exchange) / 64, rel=0.02)
    assert parts[2].bubble == pytest.approx(one.bubble / 2, rel=0.1)
