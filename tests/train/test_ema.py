"""The moving average against its definition, and what a checkpoint brings back."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.config.train import TrainConfig
from megatron_r1.errors import DataError
from megatron_r1.model.build import native_tensors
from megatron_r1.model.shards import gather_whole
from megatron_r1.train.ema import MovingAverage
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.stream import next_token_forward
from megatron_r1.train.update import update
from tests.support.layouts import model_of

ROWS_BL = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))
DECAY = 0.7


@pytest.fixture(scope="module")
def averaged(new_model):
    """A model's average over three updates, and its weights before and after each."""
    model = new_model(model_of("tiny"))
    optimizer = Optimizer(model, TrainConfig())
    average, history = MovingAverage(model, DECAY), [snapshot(model)]
    for _ in range(3):
        update(model, optimizer, ROWS_BL.split(2), next_token_forward, 1e-2, 32)
        average.update()
        history.append(snapshot(model))
    return model, average, history


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in native_tensors(model)}


def whole(average: MovingAverage) -> dict[str, torch.Tensor]:
    return dict(gather_whole(list(average.shards()), torch.device("cpu")))


def test_it_is_the_sum_over_all_steps_with_fading_weights(averaged):
    _, average, history = averaged
    found = whole(average)
    assert found.keys() == history[0].keys()
    for name, tensor in found.items():
        expected = DECAY**3 * history[0][name]
        for age, weights in enumerate(reversed(history[1:])):
            expected += (1 - DECAY) * DECAY**age * weights[name]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == torch.float32
        moved = not torch.equal(history[0][name], history[3][name])
        assert torch.equal(tensor.double(), history[3][name]) != moved, name
    assert any(name.endswith("expert_bias") and tensor.any() for name, tensor in found.items())


def test_it_resumes_from_its_saved_average(averaged):
    model, average, _ = averaged
    saved = {name: tensor.clone() for name, tensor in whole(average).items()}
    other = MovingAverage(model, DECAY)
    other.load(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in whole(other).items())
    with pytest.raises(DataError, match="missing"):
        other.load({})


def test_the_model_is_left_alone(averaged):
    model, average, history = averaged
    assert all(torch.equal(tensor, history[3][name]) for name, tensor in snapshot(model).items())
    average.close()


def test_ranks_gather_what_one_rank_has(new_model, two_ranks):
    model = new_model(model_of("tiny"))
    optimizer = Optimizer(model, TrainConfig())
    average = MovingAverage(model, 0.5)
    for _ in range(2):
        result = update(model, optimizer, ROWS_BL.split(2), next_token_forward, 1e-3, 32)
        average.update()
    first, second = (found["updates"] for found in two_ranks)
    assert second["averages"] == {}
    expected = {name: float(tensor.norm()) for name, tensor in whole(average).items()}
    assert first["averages"] == pytest.approx(expected, rel=1e-3)
    assert first["loads"] == second["loads"]
    for layer, load_E in result.passes.expert_load.items():
        assert first["loads"][layer] == pytest.approx(load_E.tolist(), abs=2)
