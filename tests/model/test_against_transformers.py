"""The model against transformers' own DeepSeek-V3, and multi-token prediction against the paper's equations.

What transformers does not have (multi-token prediction) is computed here from the report's equations 21 to 24.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.config.model import ModelConfig, RopeConfig
from megatron_r1.hf.model_config import model_config_from_hf
from megatron_r1.model.build import native_tensors, without_multi_token_prediction
from tests.support.layouts import model_of
from tests.support.native_weights import load_native_tensors
from tests.support.unsettle import unsettled
from tests.support.whole_models import export, load_tensors


def yarn() -> ModelConfig:
    model = model_of("tiny")
    model.rope = RopeConfig(factor=4.0, original_max_position=16)
    return model


SHAPES = {"tiny": lambda: model_of("tiny"), "direct query": lambda: model_of("direct_query"), "yarn": yarn}


def rows_of(model: ModelConfig, length: int = 33) -> torch.Tensor:
    return torch.randint(0, model.vocab_size, (3, length), generator=torch.Generator().manual_seed(4))


def log_probs(model, tokens_BL: torch.Tensor) -> torch.Tensor:
    positions_BL = torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)
    with torch.no_grad(), without_multi_token_prediction(model):
        return model(tokens_BL, positions_BL, None).log_softmax(-1)


@pytest.mark.parametrize("include_mtp", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_equal_those_of_transformers(shape, include_mtp, new_model, tmp_path):
    from transformers import AutoModelForCausalLM

    config = SHAPES[shape]()
    model = unsettled(new_model(config))
    export(native_tensors(model), config, tmp_path / "hf", include_mtp=include_mtp)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens_BL = rows_of(config)
    mine = log_probs(model, tokens_BL)
    with torch.no_grad():
        theirs = other(tokens_BL).logits.log_softmax(-1)
    assert mine.std() > 0.2
    difference = float((mine - theirs).abs().max())
    print(f"{shape}: largest difference of log-probabilities {difference:.2e}")
    assert difference < 2e-5


def test_weights_come_back_bitwise(new_model, tmp_path):
    config = model_of("direct_query")
    model, other = unsettled(new_model(config)), new_model(config, seed=1)
    export(native_tensors(model), config, tmp_path / "hf")
    found = model_config_from_hf(tmp_path / "hf" / "config.json")
    load_native_tensors(other, dict(load_tensors(tmp_path / "hf", found)))
    restored = dict(native_tensors(other))
    assert all(torch.equal(tensor, restored[name]) for name, tensor in native_tensors(model))
    tokens_BL = rows_of(config)
    assert torch.equal(log_probs(model, tokens_BL), log_probs(other, tokens_BL))


def test_weights_depend_on_seed_and_name_alone(new_model):
    config = model_of("tiny")
    first, again, other = (dict(native_tensors(new_model(config, seed))) for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert (tensor.dim() == 1) == torch.equal(tensor, other[name])
    drawn = torch.cat([tensor.flatten() for tensor in first.values() if tensor.dim() > 1])
    assert float(drawn.std()) == pytest.approx(0.08, rel=0.01) and abs(float(drawn.mean())) < 1e-3


def test_multi_token_loss_follows_the_report(new_model):
    """M [norm(embedding of token t+1); norm(h_t)], one layer, norm, the shared head, cross-entropy of token t+2."""
    from megatron_r1.model.forward_backward import forward_backward
    from megatron_r1.train.stream import next_token_forward

    config = model_of("tiny")
    config.moe.bias_update_rate = 0.0  # the passes must leave the model as it was
    model = unsettled(new_model(config))
    rows_BL = rows_of(config)
    layer, recorded = model.mtp.layers[0], {}
    hook = model.decoder.register_forward_hook(lambda *arguments: recorded.update(hidden_LBD=arguments[-1].detach()))
    found = loss_of_extra_predictions(model, forward_backward, next_token_forward, rows_BL)
    hook.remove()

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weight

    weights = dict(native_tensors(model))
    embedded_LBD = F.embedding(rows_BL[:, 1:-1], weights["embedding.word_embeddings.weight"]).transpose(0, 1)
    joined = [
        normed(embedded_LBD, weights["mtp.layers.0.enorm.weight"]),
        normed(recorded["hidden_LBD"][:-1], weights["mtp.layers.0.hnorm.weight"]),
    ]
    with torch.no_grad():
        projected_LBD = torch.cat(joined, -1) @ weights["mtp.layers.0.eh_proj.weight"].T
        out_LBD, _ = layer.mtp_model_layer(projected_LBD, attention_mask=None)
        final_LBD = normed(out_LBD, weights["mtp.layers.0.final_layernorm.weight"])
        logits_LBV = final_LBD @ weights["output_layer.weight"].T
    expected = F.cross_entropy(logits_LBV.flatten(0, 1), rows_BL[:, 2:].T.flatten())
    assert found == pytest.approx(float(expected), rel=1e-5)


def loss_of_extra_predictions(model, forward_backward, forward, rows_BL):
    from megatron_r1.config.train import TrainConfig
    from megatron_r1.train.optimizer import Optimizer

    optimizer = Optimizer(model, TrainConfig())
    optimizer.zero_gradients()
    return forward_backward(model, optimizer.chunks, [rows_BL], forward, rows_BL.shape[1] - 1).mtp_loss
