"""An update on preference pairs against the same loss written out in plain torch, and on two ranks against one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.model.build import native_tensors
from megatron_r1.train.routing import FROZEN
from tests.support.dpo_cases import BETA, REFERENCE_SCALE, one_update, pairs, plain_gaps, plain_loss, tiny
from tests.support.float64 import float64
from tests.support.fork_server import run_forked_to_the_end
from tests.support.learner_cases import assert_close, trainable

SUPPORT = Path(__file__).parents[1] / "support"
TOLERANCE = 1e-12
"""What float64 rounds: the parts of a sum that lie on several ranks are added in another order."""


@pytest.fixture(autouse=True, scope="module")
def in_float64(one_rank) -> Iterator[None]:
    with float64():
        yield


@pytest.fixture(scope="module")
def alone(one_rank) -> tuple[dict[str, float], dict[str, torch.Tensor], list[float]]:
    """What `one_update` gives on one rank, four micro-batches of two pairs."""
    from megatron_r1.config.parallel import ParallelConfig

    return one_update(one_rank, ParallelConfig())


@pytest.fixture(scope="module")
def plain(new_model) -> tuple[Any, Any]:
    """Policy and reference as two models; the policy with the gradients of the loss written out."""
    model, reference = trainable(new_model(tiny())), new_model(tiny())
    for _, tensor in native_tensors(reference):
        tensor *= REFERENCE_SCALE
    FROZEN.apply(model, 0)
    loss = plain_loss(model, reference, pairs())
    loss.backward()
    model.loss = float(loss.detach())
    return model, reference


def test_an_update_is_the_loss_written_out(alone, plain):
    metrics, gradients, _ = alone
    model, _ = plain
    assert metrics["train/loss"] == pytest.approx(model.loss, rel=1e-9)
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    print(f"largest relative difference of a gradient {assert_close(gradients, expected):.1e}")


def test_metrics_are_means_over_all_pairs(alone, plain):
    metrics, model, reference = alone[0], *plain
    with torch.no_grad():
        margins = BETA * (plain_gaps(model, pairs()) - plain_gaps(reference, pairs()))
    assert 0 < metrics["train/accuracy"] < 1
    assert metrics["train/accuracy"] == float((margins > 0).float().mean())
    assert metrics["train/margin"] == pytest.approx(float(margins.mean()), rel=1e-9)
    assert metrics["train/margin"] == pytest.approx(
        metrics["train/chosen_reward"] - metrics["train/rejected_reward"], rel=1e-9
    )


def test_validation_margins_are_those_of_each_pair_alone(alone, plain):
    model, reference = plain
    with torch.no_grad():
        expected = BETA * (plain_gaps(model, pairs(5)) - plain_gaps(reference, pairs(5)))
    assert alone[2] == pytest.approx(expected.tolist(), rel=1e-9)


def test_micro_batches_add_up(alone, one_rank, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT.parent / "dist"))
    from megatron_r1.config.parallel import ParallelConfig

    metrics, gradients, _ = one_update(one_rank, ParallelConfig(), size=8)
    assert metrics == pytest.approx(alone[0], rel=1e-9, abs=1e-9)
    trained = {name: gradient for name, gradient in alone[1].items() if not name.startswith("mtp.")}
    assert_close(gradients, {name: value for name, value in trained.items() if "expert_bias" not in name})


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "ep2"])
def test_two_ranks_update_as_one_does(layout, alone, tmp_path):
    run_forked_to_the_end(SUPPORT / "ranks_dpo.py", tmp_path, layout, ranks=2)
    metrics, gradients, margins = alone
    found = json.loads((tmp_path / "found.json").read_text())
    norm = found["metrics"].pop("norm")
    assert norm == pytest.approx(metrics["norm"], rel=1e-6), "megatron-core adds the norms of ranks in fp32"
    assert found["metrics"] == pytest.approx({k: v for k, v in metrics.items() if k != "norm"}, rel=1e-9)
    assert found["margins"] == pytest.approx(margins, rel=1e-9, abs=1e-9)
    theirs = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert theirs.keys() == gradients.keys()
    distances = {name: (theirs[name] - g).norm() / g.norm().clamp(min=1e-9) for name, g in gradients.items()}
    worst = max(distances, key=distances.__getitem__)
    print(f"{layout}: {worst} differs by {distances[worst]:.1e}")
    assert distances[worst] < TOLERANCE, worst
