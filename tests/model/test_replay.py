"""Routers under replay use the recorded experts, with gradient; the in-process engine records its experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.model.build import build_model, without_multi_token_prediction
from megatron_r1.model.replay import NOT_RECORDED, RoutingReplay
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.in_process import LocalEngine
from megatron_r1.rollout.routed_experts import RoutedLayers
from tests.support.layouts import model_of
from tests.support.samples import row_of, tokens_of
from tests.support.unsettle import unsettled

TOKENS_BL = torch.randint(5, 512, (3, 10), generator=torch.Generator().manual_seed(4))
POSITIONS_BL = torch.arange(10).expand(3, 10)


def logits_of(model):
    with without_multi_token_prediction(model):
        return model(TOKENS_BL, POSITIONS_BL, None)


def choices(model, replay) -> torch.Tensor:
    """Experts [B, L, N, K] that the routers take by themselves."""
    with torch.no_grad(), replay.recording() as routes:
        logits_of(model)
        return routes().unflatten(0, (10, 3)).transpose(0, 1)


@pytest.fixture
def model(new_model):
    return unsettled(new_model(model_of("tiny")))


@pytest.fixture
def replay(model):
    return RoutingReplay(model, model_of("tiny").moe.first_dense_layers)


def test_multi_token_layers_are_left_alone(model, replay):
    replayed = {
        name for name, module in model.named_modules() if isinstance(module, TopKRouter) and module.router_replay
    }
    assert replayed and not any("mtp" in name for name in replayed)
    assert {name.split(".")[0] for name in replayed} == {"decoder"}
    assert any("mtp" in name for name, module in model.named_modules() if isinstance(module, TopKRouter))
    assert not RouterReplay.global_router_replay_instances


def test_a_replay_of_its_own_choice_computes_the_same(model, replay):
    expected = logits_of(model)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    own_BLNK = choices(model, replay)
    model.zero_grad()
    with replay.replaying(own_BLNK, backward=True):
        found = logits_of(model)
    found.sum().backward()
    replay.done()
    assert torch.equal(found, expected)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-7)
    assert replay.count() == (own_BLNK.numel(), 0) and replay.count() == (0, 0)


def test_a_replay_of_another_choice_is_obeyed_and_weighted_by_own_scores(model, replay):
    """Router and experts of the first sparse layer, written out."""
    own_BLNK = choices(model, replay)
    replayed_BLNK = (own_BLNK + 3) % 8
    replayed_BLNK[0] = NOT_RECORDED
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    recorded = {}
    layer.router.register_forward_hook(lambda _, inputs, output: recorded.update(hidden=inputs[0], output=output))
    with replay.replaying(replayed_BLNK, backward=False):
        logits_of(model)
    probs_TE, map_TE = recorded["output"]
    expected_BLK = torch.where(replayed_BLNK == NOT_RECORDED, own_BLNK, replayed_BLNK)[:, :, 0]
    expected_TK = expected_BLK.transpose(0, 1).flatten(0, 1)
    # Of tokens without recorded experts only what does not depend on earlier layers is known.
    assert torch.equal(map_TE.nonzero()[:, 1].view(-1, 2), expected_TK.sort(-1).values)
    scores_TE = torch.sigmoid(recorded["hidden"].flatten(0, 1).float() @ layer.router.weight.float().T)
    gates_TK = scores_TE.gather(1, expected_TK)
    gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True) * model_of("tiny").moe.scaling_factor
    torch.testing.assert_close(probs_TE.gather(1, expected_TK), gates_TK, rtol=1e-5, atol=1e-6)
    replayed, mismatches = replay.count()
    assert replayed == replayed_BLNK[1:].numel() and 0 < mismatches <= replayed


def test_the_gates_have_gradients(model, replay):
    replayed_BLNK = (choices(model, replay) + 3) % 8
    with replay.replaying(replayed_BLNK, backward=True):
        logits = logits_of(model)
    logits.square().sum().backward()
    replay.done()
    gradients = [
        p.grad.abs().max() for n, p in model.named_parameters() if n.endswith("router.weight") and "mtp" not in n
    ]
    assert gradients and min(gradients) > 0


def test_several_passes_before_their_backward_passes_recompute_their_own(one_rank):
    """With everything recomputed, and two micro-batches with different recorded experts in flight."""
    from megatron_r1.config.parallel import ParallelConfig

    grads = {}
    for recompute in (False, True):
        performance = PerformanceConfig(recompute_modules=["moe"]) if recompute else PerformanceConfig()
        shape = model_of("tiny")
        model = unsettled(build_model(shape, ParallelConfig(), one_rank, 0, performance))
        replay = RoutingReplay(model, shape.moe.first_dense_layers)
        own_BLNK, outputs = choices(model, replay), []
        for shift in (3, 5):
            with replay.replaying((own_BLNK + shift) % 8, backward=True):
                outputs.append(logits_of(model))
        for output in outputs:
            output.square().sum().backward()
        replay.done()
        grads[recompute] = [p.grad for p in model.parameters() if p.grad is not None]
    for plain, again in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", ["tiny", "direct_query"])
def test_the_local_engine_records_its_choice(new_model, shape):
    """The same experts as when prompt and response are read at once."""
    config = model_of(shape)
    model = unsettled(new_model(config))
    replay = RoutingReplay(model, config.moe.first_dense_layers)
    layers = RoutedLayers(config.num_layers, config.moe.first_dense_layers, config.moe.top_k)
    prompts = [(5, 6, 7), (9, 10, 11, 12, 13), (5, 6, 7)]
    requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
    sampling = Sampling(1.0, 1.0, 9, (17, 3), 0, layers)
    completions = LocalEngine(model, 8, 0, replay).generate(requests, sampling)
    plain = LocalEngine(model, 8, 0, replay).generate(requests, Sampling(1.0, 1.0, 9, (17, 3), 0))
    assert [tokens_of(c) for c in plain] == [tokens_of(c) for c in completions]
    for completion in completions:
        inputs_BL = row_of(completion)[:, :-1]
        with torch.no_grad(), without_multi_token_prediction(model), replay.recording() as routes:
            model(inputs_BL, torch.arange(inputs_BL.shape[1])[None], None)
            read_TNK = routes()
        replayed_TNK = torch.from_numpy(completion.response.routed_experts.astype(np.int64))
        assert torch.equal(replayed_TNK.sort(-1).values, read_TNK.sort(-1).values)
