"""Drawn shapes of every family against transformers: log-probabilities and gradients.

Gradients take the same table of names as weights do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.export import hf_tensors
from megatron_r1.hf.model_config import model_config_from_hf
from megatron_r1.model.build import native_tensors, without_multi_token_prediction
from tests.support.draws import GROUPED, MSCALES, grouped_shape, sparse_shape
from tests.support.gradients import largest
from tests.support.unsettle import unsettled
from tests.support.whole_models import export, load_tensors

SPARSE_SHAPES, GROUPED_SHAPES = 36, 10
WITH_GRADIENTS = {"deepseek": 15} | dict.fromkeys(GROUPED, 5)
LARGEST_DIFFERENCE = 2e-5
"""Of log-probabilities, in fp32."""
CASES = [("deepseek", seed) for seed in range(SPARSE_SHAPES)]
CASES += [(kind, seed) for kind in GROUPED for seed in range(GROUPED_SHAPES)]


def test_draws_cover_what_they_are_for():
    shapes = [sparse_shape(seed) for seed in range(SPARSE_SHAPES)]
    for shapes_of_one in (shapes, [shape for shape in shapes if shape.moe.score_function == "softmax"]):
        attentions, mixtures, ropes = ([getattr(s, n) for s in shapes_of_one] for n in ("attention", "moe", "rope"))
        assert {a.q_lora_rank > 0 for a in attentions} == {True, False}
        assert {a.v_head_dim > a.qk_nope_head_dim + a.qk_rope_head_dim for a in attentions} == {True, False}
        assert {m.num_groups for m in mixtures} == {1, 2, 4}
        assert {m.num_shared_experts for m in mixtures} == {1, 2}
        assert {m.first_dense_layers for m in mixtures} == {0, 1, 2, 3}
        assert {r.factor for r in ropes} == {1.0, 4.0, 40.0}
        assert {(r.mscale, r.mscale_all_dim) for r in ropes if r.factor > 1} == set(MSCALES)
    assert len({s.moe.top_k // s.moe.group_top_k for s in shapes if s.moe.group_top_k < s.moe.num_groups}) > 2
    grouped = [grouped_shape(kind, seed) for kind in GROUPED for seed in range(GROUPED_SHAPES)]
    assert {s.attention.num_key_value_heads for s in grouped} == {1, 2, 4}
    assert sum(s.rope.factor > 1 for s in grouped) >= 3
    assert sum(s.tied_embeddings for s in grouped) == len(grouped) // 2
    experts = [s.moe for s in grouped if s.moe.num_experts]
    assert {m.score_function for m in experts} == {"softmax", "softmax_topk"}
    assert all(m.top_k < m.num_experts for m in experts)
    assert len({m.num_experts for m in experts}) > 1 and len({m.top_k for m in experts}) > 1


def log_probs(logits_BLV: Tensor) -> Tensor:
    return logits_BLV.float().log_softmax(-1)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_drawn_shape(kind, seed, new_model, tmp_path):
    from transformers import AutoModelForCausalLM

    config = sparse_shape(seed) if kind == "deepseek" else grouped_shape(kind, seed)
    model = unsettled(new_model(config))
    folder = export(native_tensors(model), config, tmp_path / "hf", include_mtp=False)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(0, config.vocab_size, (2, 40), generator=generator)
    positions_BL = torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)
    with without_multi_token_prediction(model):
        mine_BLV = log_probs(model(tokens_BL, positions_BL, None))
    theirs_BLV = log_probs(other(tokens_BL).logits)
    assert mine_BLV.std() > 0.2
    difference = float((mine_BLV - theirs_BLV).detach().abs().max())
    print(f"{kind} {seed}: largest difference of log-probabilities {difference:.1e}")
    assert difference < LARGEST_DIFFERENCE
    weights = dict(native_tensors(model))
    assert_same_model_comes_back(folder, config, weights)
    if seed < WITH_GRADIENTS[kind]:
        weight_BLV = torch.randn(mine_BLV.shape, generator=generator) / mine_BLV.numel()
        (mine_BLV * weight_BLV).sum().backward()
        (theirs_BLV * weight_BLV).sum().backward()
        print(
            f"{kind} {seed}: largest relative difference of a gradient {compared_gradients(model, other, config):.1e}"
        )


def assert_same_model_comes_back(folder, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    found = model_config_from_hf(folder / "config.json")
    found.moe.bias_update_rate, found.moe.sequence_loss_coefficient = (
        config.moe.bias_update_rate,
        config.moe.sequence_loss_coefficient,
    )
    found.mtp = config.mtp
    if config.rope.factor == 1:
        found.rope = config.rope
    assert found == config
    for name, tensor in load_tensors(folder, found, include_mtp=False):
        assert torch.equal(tensor, weights[name]), name


def compared_gradients(model, other, config: ModelConfig) -> float:
    """Largest norm of a gradient's difference relative to the gradient's norm, over all weights but the bias."""
    native = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    mine = dict(hf_tensors(native, config, include_mtp=False, complete=False, dtype=torch.float32))
    theirs = {name: grad for parameter in other.named_parameters() for name, grad in unfused(*parameter)}
    assert mine.keys() == theirs.keys()
    longest = max(float(gradient.norm()) for gradient in theirs.values())
    differences = []
    for name, gradient in theirs.items():
        # An expert that few tokens visit has a gradient that rounding reaches.
        scale = max(float(gradient.norm()), 1e-3 * longest)
        differences.append(float((mine[name] - gradient).norm()) / scale)
    assert largest(differences) < 1e-4
    return largest(differences)


def unfused(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter's gradient by checkpoint names; transformers holds all experts of a layer in two tensors."""
    assert parameter.grad is not None
    prefix, fused, last = name.partition(".experts.")
    if not fused:
        yield name, parameter.grad
        return
    for expert, gradient in enumerate(parameter.grad):
        if last == "down_proj":
            yield f"{prefix}.experts.{expert}.down_proj.weight", gradient
        else:
            for part, half in zip(("gate_proj", "up_proj"), gradient.chunk(2), strict=True):
                yield f"{prefix}.experts.{expert}.{part}.weight", half
