"""Attention and rotary positions of sequences that lie end to end, against each sequence alone, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_r1.model.megatron_overrides import rotate_packed_at_once
from megatron_r1.model.te_layout_modules import CoreAttention

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LENGTHS = [[1], [5, 5, 5], [9, 1, 40, 8, 41, 2, 2], [64, *range(1, 30)]]


def drawn(lengths: list[int], heads: int, groups: int, widths: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    generator, tokens = torch.Generator().manual_seed(len(lengths)), sum(lengths)
    shapes = (tokens, heads, widths[0]), (tokens, groups, widths[0]), (tokens, groups, widths[1])
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return tensors, torch.tensor([0, *lengths]).cumsum(0).int()


def alone(query_LHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, scale: float) -> Tensor:
    """Softmax over the positions up to the query's own, written out: [L, H * D_v]."""
    repeats = query_LHD.shape[1] // key_LGD.shape[1]
    key_LHD, value_LHD = (x_LGD.repeat_interleave(repeats, 1) for x_LGD in (key_LGD, value_LGD))
    scores_HLL = torch.einsum("qhd,khd->hqk", query_LHD, key_LHD) * scale
    later_LL = torch.ones(scores_HLL.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores_HLL.masked_fill(later_LL, -torch.inf).softmax(-1), value_LHD).flatten(1)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "groups", "widths"), [(4, 4, (6, 6)), (4, 2, (6, 6)), (3, 3, (6, 4))])
def test_each_sequence_attends_to_itself_alone(one_rank, lengths, heads, groups, widths):
    tensors, bounds = drawn(lengths, heads, groups, widths)
    attention = CoreAttention(SimpleNamespace(context_parallel_size=1), 1, AttnMaskType.causal, "self", 0.4)
    found = attention(*tensors, None, packed_seq_params=SimpleNamespace(cu_seqlens_q=bounds))
    expected = torch.cat([alone(*parts, 0.4) for parts in zip(*(x.split(lengths) for x in tensors), strict=True)])
    torch.testing.assert_close(found, expected, **EXACT)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    for gradient, wanted in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, **EXACT)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_positions_rotate_as_megatron_core_rotates_one_sequence_after_another(one_rank, lengths, interleaved):
    one_after_another = rope_utils._apply_rotary_pos_emb_thd
    rotate_packed_at_once()
    at_once = rope_utils._apply_rotary_pos_emb_thd
    rotate_packed_at_once()  # again changes nothing
    assert rope_utils._apply_rotary_pos_emb_thd is at_once
    (x_THD, *_), bounds = drawn(lengths, 3, 3, (10, 10))
    freqs_L11D = torch.rand(max(lengths) + 2, 1, 1, 8, dtype=torch.float64) * 3
    given = {"mla_rotary_interleaved": interleaved, "mscale": 1.2, "cp_group": torch.distributed.group.WORLD}
    found = at_once(x_THD, bounds, freqs_L11D, **given)
    whole = torch.cat([rope_utils._apply_rotary_pos_emb_bshd(
        x_LHD[:, None], freqs_L11D[: len(x_LHD)], mla_rotary_interleaved=interleaved, mscale=1.2
    )[:, 0] for x_LHD in x_THD.split(lengths)])  # fmt: skip
    torch.testing.assert_close(found, whole, **EXACT)
    assert one_after_another is not None
