"""One update: what it changes, what a gradient that is not finite leaves alone, and two ranks against one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_r1.commands.pretrain import pretraining_step
from megatron_r1.config.run import RunConfig
from megatron_r1.config.train import OptimizerConfig, TrainConfig
from megatron_r1.data.pretraining.corpus import Corpus
from megatron_r1.errors import Diverged
from megatron_r1.model.build import native_tensors
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.routing import check_none_dropped
from megatron_r1.train.state import TrainState
from megatron_r1.train.stream import next_token_forward
from megatron_r1.train.update import update
from tests.support.layouts import model_of
from tests.support.optimizer_states import restore, state_of

ROWS_BL = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained(new_model):
    """A model and its optimizer after one update, so that every moment exists."""
    model = new_model(model_of("tiny"))
    optimizer = Optimizer(model, TrainConfig())
    assert not update(model, optimizer, ROWS_BL.split(2), next_token_forward, 1e-3, 32).skipped
    return model, optimizer


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in [*native_tensors(model), *state_of(model, optimizer).items()]}


def broken_forward(model, rows_BL):
    """The second micro-batch's loss is not a number."""
    output, loss_function = next_token_forward(model, rows_BL)

    def broken(output_BL):
        loss, logged = loss_function(output_BL)
        return loss * (float("nan") if torch.equal(rows_BL, ROWS_BL[2:]) else 1.0), logged

    return output, broken


def test_an_update_moves_weights_moments_and_router_bias(trained):
    model, optimizer = trained
    before = everything(model, optimizer)
    result = update(model, optimizer, ROWS_BL.split(2), next_token_forward, 1e-3, 32)
    after = everything(model, optimizer)
    moved = {
        name.split("/")[0] if "/" in name else name for name in before if not torch.equal(before[name], after[name])
    }
    assert {"exp_avg", "exp_avg_sq", "embedding.word_embeddings.weight", "mtp.layers.0.eh_proj.weight"} <= moved
    assert any(name.endswith("expert_bias") for name in moved)
    assert result.gradient_norm > 0 and not result.skipped
    assert list(result.passes.expert_load) == ["layer 2", "layer 3", "layer 4", "mtp 1"]
    # 4 rows of 32 tokens, 2 of 8 experts each.
    assert {tuple(load_E.shape) for load_E in result.passes.expert_load.values()} == {(8,)}
    check_none_dropped(result.passes.expert_load, 4 * 32, 2)


def test_a_gradient_that_is_not_finite_changes_nothing(trained):
    model, optimizer = trained
    before = everything(model, optimizer)
    result = update(model, optimizer, ROWS_BL.split(2), broken_forward, 1e-3, 32)
    after = everything(model, optimizer)
    assert result.skipped and np.isnan(result.gradient_norm)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not update(model, optimizer, ROWS_BL.split(2), next_token_forward, 1e-3, 32).skipped


def test_micro_batches_do_not_change_the_update(new_model):
    norms = []
    for size in (1, 2, 4):
        model = new_model(model_of("tiny"))
        optimizer = Optimizer(model, TrainConfig())
        norms.append(update(model, optimizer, ROWS_BL.split(size), next_token_forward, 1e-3, 32).gradient_norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_skips_are_recorded_and_too_many_in_a_row_end_the_run(trained, one_rank):
    model, optimizer = trained
    config = RunConfig()
    config.train.global_batch_size = config.train.micro_batch_size = 2
    config.train.sequence_length, config.train.max_skipped_steps = 16, 2
    corpus = Corpus(np.arange(500, dtype=np.int32) % 512, 16, 0)
    this = SimpleNamespace(config=config, model=model, optimizer=optimizer, platform=one_rank)
    step, state = pretraining_step(this, corpus), TrainState()
    state, row = step(state)
    assert (state.updates, row["train/skipped_updates"], state.skipped_in_row) == (1, 0, 0)
    with torch.no_grad():
        dict(model.named_parameters())["output_layer.weight"][0, 0] = float("nan")
    for skips in (1, 2):
        state, row = step(state)
        assert (state.updates, row["train/skipped_updates"], state.skipped_in_row) == (1, 1, skips)
    with pytest.raises(Diverged, match="max_skipped_steps=2"):
        step(state)


def test_an_optimizer_resumes_from_its_tensors_bitwise(trained, new_model):
    model, optimizer = trained
    other = new_model(model_of("tiny"), seed=1)
    for (_, mine), (_, theirs) in zip(native_tensors(model), native_tensors(other), strict=True):
        theirs.copy_(mine)
    resumed = Optimizer(other, TrainConfig())
    restore(other, resumed, state_of(model, optimizer), updates=1)
    for each in ((model, optimizer), (other, resumed)):
        update(*each, ROWS_BL.split(2), next_token_forward, 1e-3, 32)
    first, second = everything(model, optimizer), everything(other, resumed)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_optimizer_without_moments_is_saved_and_loaded(new_model):
    model = new_model(model_of("tiny"))
    optimizer = Optimizer(model, TrainConfig())
    saved = state_of(model, optimizer)
    assert saved and not any(tensor.any() for tensor in saved.values())
    restore(model, optimizer, saved, updates=0)
    assert not update(model, optimizer, ROWS_BL.split(2), next_token_forward, 1e-3, 32).skipped


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_matrices_decay_and_norms_do_not(new_model, moments):
    """Without a gradient AdamW only decays, by learning rate x weight decay."""
    model = new_model(model_of("tiny"))
    optimizer = Optimizer(model, TrainConfig(optimizer=OptimizerConfig(weight_decay=0.5, moments_dtype=moments)))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.zero_gradients()
    optimizer.step(0.25)
    factors = {1: 1.0, 2: 1 - 0.25 * 0.5}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * factors[parameter.dim()], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", ["tiny", "grouped_bias", "grouped_norm", "grouped_experts"])
def test_two_tensor_parallel_ranks_train_as_one(new_model, two_ranks, shape):
    config = model_of(shape)
    model, rows_BL = new_model(config), ROWS_BL % config.vocab_size
    optimizer = Optimizer(model, TrainConfig())
    results = [update(model, optimizer, rows_BL.split(2), next_token_forward, 1e-3, 32) for _ in range(2)]
    losses = [float(torch.stack([entry["train/loss"] for entry in result.passes.logged]).mean()) for result in results]
    for rank in two_ranks:
        found = rank["updates" if shape == "tiny" else shape]
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert found["norms"] == pytest.approx([r.gradient_norm for r in results], rel=1e-4)
        if config.mtp.num_layers:
            assert found["mtp_losses"] == pytest.approx([r.passes.mtp_loss for r in results], rel=1e-5)
        assert found["loads"].keys() == results[-1].passes.expert_load.keys()
    assert bool(results[-1].passes.expert_load) == (shape == "tiny")  # megatron-core counts for balancing biases alone
