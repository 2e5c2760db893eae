"""Two to eight GPUs of a machine: layouts, dispatchers, the combined schedule against one GPU, and weights by NCCL."""

from __future__ import annotations

import json

import pytest

from tests.support.gpus import REHEARSAL, losses, needs_gpus, run_program, run_verb
from tests.support.gradients import largest

pytestmark = [*needs_gpus(2), pytest.mark.timeout(1300)]
STEPS = 8
MODEL = ("model.dtype=bf16", "model.num_layers=4", "train.global_batch_size=16", "train.micro_batch_size=2")
ROUNDING = 0.02
"""Relative difference of a step's loss that the order of addition in bf16 explains in so few steps."""
LAYOUTS = {
    "dp2": (2, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "cp2": (2, ("parallel.context=2",)),
    "ep2": (2, ("parallel.expert=2",)),
    "pp2-vpp2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "tp2-ep2-etp2": (4, ("parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2")),
    "tp2-pp2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "tp2-pp2-ep4": (8, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4")),
}
"""Name -> ranks, and what is set."""
COMBINED = (
    "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.expert=2", "performance=deepseek",
)  # fmt: skip


def pretrain(folder, name: str, ranks: int, *settings: str) -> list[float]:
    run_verb(
        *("pretrain", f"root='{folder}'", f"name={name}", *MODEL, f"train.steps={STEPS}", *settings),
        ranks=ranks,
        seconds=1200,
    )
    return losses(folder / name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """Losses of one GPU; another seed's differ by far, or nothing here would tell anything."""
    folder = tmp_path_factory.mktemp("alone")
    expected = pretrain(folder, "one", 1)
    assert difference(pretrain(folder, "other", 1, "seed=9"), expected) > ROUNDING
    return expected


def difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS
    return largest(abs(one / two - 1) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpus(LAYOUTS[name][0])) for name in LAYOUTS])
def test_layouts_learn_as_one_gpu_does(tmp_path, record_property, alone, name):
    ranks, settings = LAYOUTS[name]
    found = difference(pretrain(tmp_path, name, ranks, *settings), alone)
    record_property("largest relative difference", f"{found:.1e}")
    assert found < ROUNDING


@pytest.mark.skipif(REHEARSAL, reason="needs CUDA")
def test_deepep_exchanges_what_all_to_all_does(tmp_path, record_property, alone):
    pytest.importorskip("deep_ep", reason="needs DeepEP")
    settings = ("parallel.expert=2", "performance.moe_token_dispatcher_type=deepep")
    found = difference(pretrain(tmp_path, "deepep", 2, *settings), alone)
    record_property("largest relative difference", f"{found:.1e}")
    assert found < ROUNDING


@pytest.mark.skipif(REHEARSAL, reason="needs CUDA")
@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
@pytest.mark.parametrize("ranks", [pytest.param(4, marks=needs_gpus(4)), pytest.param(8, marks=needs_gpus(8))])
def test_the_combined_schedule_learns_as_one_gpu_does(tmp_path, record_property, alone, dispatcher, ranks):
    settings = (*COMBINED, f"performance.moe_token_dispatcher_type={dispatcher}")
    found = difference(pretrain(tmp_path, "combined", ranks, *settings), alone)
    record_property("largest relative difference", f"{found:.1e}")
    assert found < ROUNDING


@pytest.mark.skipif(REHEARSAL, reason="needs CUDA")
def test_a_server_on_its_own_gpu_has_the_weights_that_were_sent(tmp_path, record_property):
    """By NCCL between two GPUs."""
    from tests.gpu.test_server_weights import NATS

    run_program("server_weights.py", "group", tmp_path, "rollout.sglang.first_gpu=1", seconds=1200)
    found = json.loads((tmp_path / "found.json").read_text())
    record_property("gaps", found)
    assert found["entropy"] < 2.5
    assert found["first"] < NATS and found["second"] < NATS < found["stale"] / 3
