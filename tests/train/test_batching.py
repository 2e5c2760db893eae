"""Sequences divided among data-parallel ranks: each in one share, and the shares about as long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.train.batching import divide_by_tokens


@pytest.mark.parametrize("equal_counts", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_get_about_as_many_tokens(ranks: int, equal_counts: bool) -> None:
    tokens_B = np.random.default_rng(ranks).integers(1, 4097, 64)
    shares = divide_by_tokens(tokens_B.tolist(), ranks, equal_counts)
    assert sorted(np.concatenate(shares)) == list(range(64))
    assert not equal_counts or {len(share) for share in shares} == {64 // ranks}
    sums = [int(tokens_B[share].sum()) for share in shares]
    in_turn = [int(tokens_B[rank::ranks].sum()) for rank in range(ranks)]
    mean = tokens_B.sum() / ranks
    print(f"{ranks} ranks: {max(sums) / mean - 1:.4f} above the mean, in turn {max(in_turn) / mean - 1:.4f}")
    assert max(sums) / mean - 1 < 0.03 and (ranks == 1 or max(sums) < max(in_turn))


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 9), st.booleans())
def test_every_sequence_is_in_one_share_and_no_rank_goes_without(lengths: list[int], ranks: int, equal: bool) -> None:
    shares = divide_by_tokens(lengths, ranks, equal)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(
        [lengths[index] for index in share] == sorted((lengths[i] for i in share), reverse=True) for share in shares
    )
    if lengths and min(lengths) > 0:
        assert sum(bool(share) for share in shares) == min(ranks, len(lengths))
