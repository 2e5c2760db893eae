"""Layers of one node each: values and gradients against torch's own functions and finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megatron_r1.model.fused import (
    BLOCK_LOGITS,
    GRADIENT_BUFFER,
    Copies,
    LatentProjections,
    cross_entropy,
    grouped_linear,
    linear,
    rms_norm,
    rotated_heads,
    swiglu,
    weighted_swiglu,
)

COUNTS = [3, 0, 4]
"""Rows of each expert: one gets none."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_gradients_are_those_of_finite_differences():
    experts = [drawn(5, 4) for _ in COUNTS]
    assert gradcheck(linear, (drawn(2, 3, 4), drawn(5, 4)))
    assert gradcheck(lambda x, *weights: grouped_linear(x, COUNTS, weights), (drawn(7, 4), *experts))
    assert gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6), (drawn(2, 3, 4), drawn(4)))
    assert gradcheck(swiglu, (drawn(2, 3, 8),))
    assert gradcheck(weighted_swiglu, (drawn(3, 8), drawn(3)))


def test_values_are_torchs_own():
    x, weight, experts = drawn(7, 4), drawn(5, 4), [drawn(5, 4) for _ in COUNTS]
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    expected = torch.cat([F.linear(part, expert) for part, expert in zip(x.split(COUNTS), experts, strict=True)])
    torch.testing.assert_close(grouped_linear(x, COUNTS, experts), expected)
    torch.testing.assert_close(rms_norm(x, weight[0], 1e-3), F.rms_norm(x, (4,), weight[0], 1e-3))
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :2]) * x[:, 2:])
    torch.testing.assert_close(weighted_swiglu(x, x[:, 0]), F.silu(x[:, :2]) * x[:, 2:] * x[:, :1])


def test_bf16_keeps_its_type():
    x = drawn(7, 4, dtype=torch.bfloat16)
    weights_N = torch.rand(7, requires_grad=True)
    product = weighted_swiglu(x, weights_N)
    product.sum().backward()
    assert (product.dtype, x.grad.dtype, weights_N.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert rms_norm(x, torch.ones(4, dtype=torch.bfloat16), 1e-6).dtype == torch.bfloat16


def test_a_gradient_is_added_to_the_weights_buffer():
    x, experts = drawn(7, 4), [drawn(5, 4) for _ in COUNTS]
    expected = torch.autograd.grad(grouped_linear(x, COUNTS, experts).sin().sum(), experts)
    for expert in experts:
        setattr(expert, GRADIENT_BUFFER, torch.ones_like(expert).detach())
    grouped_linear(x, COUNTS, experts).sin().sum().backward()
    linear(x, experts[1]).sum().backward()
    for expert, gradient in zip(experts, expected, strict=True):
        assert expert.grad is None
        if expert is experts[1]:
            gradient = gradient + x.detach().sum(0)
        torch.testing.assert_close(getattr(expert, GRADIENT_BUFFER), gradient + 1)


def test_copies_of_tokens_go_to_their_experts_and_back():
    tokens, experts, top_k = 9, 5, 2
    chosen_TK = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])  # the last expert gets none
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen_TK, True)
    map_TE[3] = False  # one token goes nowhere
    copies = Copies(map_TE)
    assert copies.counts == map_TE.sum(0).tolist()
    x_TD = drawn(tokens, 3)
    gathered_ND = copies.gather(x_TD)
    for expert, part in enumerate(gathered_ND.split(copies.counts)):
        torch.testing.assert_close(part, x_TD[map_TE[:, expert]])
    y_ND = drawn(*gathered_ND.shape)
    expected_TD = torch.zeros_like(x_TD).index_add(0, copies.token_N, y_ND)
    torch.testing.assert_close(copies.sum(y_ND), expected_TD)
    assert gradcheck(copies.gather, (x_TD,))
    assert gradcheck(copies.sum, (y_ND,))


@pytest.mark.parametrize("value", [3, 12])
def test_heads_turn_as_megatron_core_turns_them(one_rank, value):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    length, batch, heads, content, rotary = 5, 2, 3, 4, 6
    query, key_value = drawn(length, batch, heads, content + rotary), drawn(length, batch, heads, content + value)
    rotary_key, angles_LR = drawn(length, batch, rotary), torch.rand(length, rotary // 2, dtype=torch.float64)
    turn = 1.5 * angles_LR.cos(), 1.5 * angles_LR.sin()

    def plain(query, key_value, rotary_key):
        frequencies = torch.cat([angles_LR, angles_LR], -1)[:, None, None]
        turned_query, turned_key = (
            _apply_rotary_pos_emb_bshd(x, frequencies, mla_rotary_interleaved=True, mscale=1.5)
            for x in (query[..., content:], rotary_key[:, :, None])
        )
        key = torch.cat([key_value[..., :content], turned_key.expand(-1, -1, heads, -1)], -1)
        return torch.cat([query[..., :content], turned_query], -1), key, key_value[..., content:]

    def fused(*projections):
        query, key, padded = rotated_heads(LatentProjections(*projections), *turn)
        assert padded.shape[-1] >= query.shape[-1] and not padded[..., value:].any()
        return query, key, padded[..., :value]

    for found, expected in zip(fused(query, key_value, rotary_key), plain(query, key_value, rotary_key), strict=True):
        torch.testing.assert_close(found, expected)
    assert gradcheck(fused, (query, key_value, rotary_key))


@pytest.mark.parametrize("vocabulary", [7, BLOCK_LOGITS // 2])
def test_cross_entropy_is_torchs_own(vocabulary):
    logits_TV, targets_T = 3 * drawn(5, vocabulary), torch.randint(0, vocabulary, (5,))
    weight_T = torch.rand(5, dtype=torch.float64)
    expected_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    [gradient_TV] = torch.autograd.grad(expected_T @ weight_T, logits_TV, retain_graph=True)
    copy_TV = logits_TV.detach().requires_grad_() * 1.0  # a tensor of its own: the function works in its memory
    found_T = cross_entropy(copy_TV, targets_T)
    torch.testing.assert_close(found_T, expected_T.detach())
    [found_TV] = torch.autograd.grad(found_T @ weight_T, copy_TV)
    torch.testing.assert_close(found_TV, gradient_TV)
