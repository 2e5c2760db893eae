"""Blending: exact shares, every sequence in turn, and a position known without its predecessors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.pretraining.blend import BLOCK, Blend, shares
from megatron_r1.errors import ConfigError


def test_each_source_is_read_in_turn_and_in_its_share():
    blend = Blend([3.0, 1.0, 0.5], 0)
    sources = [blend.at(position) for position in range(2 * BLOCK)]
    counts = Counter(source for source, _ in sources)
    assert [counts[source] for source in range(3)] == (2 * shares([3.0, 1.0, 0.5], BLOCK)).tolist()
    for source in range(3):
        assert [position for found, position in sources if found == source] == list(range(counts[source]))
    early = Counter(source for source, _ in sources[: BLOCK // 10])
    assert early[0] / (BLOCK // 10) == pytest.approx(2 / 3, abs=0.05)


def test_a_position_stands_alone_and_seeds_differ():
    first, blend = Blend([1, 2], 0), Blend([1, 2], 0)
    whole = [first.at(position) for position in range(3 * BLOCK)]
    for position in (2 * BLOCK + 5, 0, BLOCK, 7, BLOCK - 1, 2 * BLOCK):
        assert blend.at(position) == whole[position]
    other = Blend([1, 2], 1)
    assert [other.at(position) for position in range(50)] != whole[:50]
    assert blend.at(10**12)[1] == pytest.approx(10**12 / (3 if blend.at(10**12)[0] == 0 else 1.5), rel=1e-3)


def test_one_source_is_read_as_it_is():
    blend = Blend([0.1], 0)
    assert [blend.at(position) for position in (0, 1, BLOCK, 12345678)] == [(0, p) for p in (0, 1, BLOCK, 12345678)]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.integers(1, 1000))
def test_shares_are_whole_and_nearest(weights, total):
    found = shares(weights, total)
    assert found.sum() == total
    assert (np.abs(found - np.array(weights) / sum(weights) * total) < 1).all()


def test_a_share_too_small_for_a_slot_is_refused():
    with pytest.raises(ConfigError, match=r"weight=1e-05: must be at least 0\.0001 of the sum"):
        Blend([1.0, 1e-5], 0)
