"""Best-fit packing: against placing one piece at a time, and nothing lost, doubled or needlessly cut."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.packing import best_fit, pack


def one_at_a_time(lengths, capacity):
    """Rooms left by best-fit decreasing as the textbook has it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=80))))
def test_groups_go_where_single_pieces_would(drawn):
    capacity, lengths = drawn
    lengths_P = np.array(lengths, dtype=np.int64)
    sequence_P = best_fit(lengths_P, capacity)
    filled = np.bincount(sequence_P, lengths_P).astype(int) if lengths else np.empty(0, int)
    assert sorted(capacity - filled) == one_at_a_time(lengths, capacity)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(2, 30), st.lists(st.integers(0, 100), max_size=60), st.integers(0, 3))
def test_every_target_counts_once_and_only_long_documents_are_cut(capacity, lengths, seed):
    packing = pack(np.array(lengths, dtype=np.int64), capacity, seed)
    steps = Counter(
        (document, at)
        for document, start, stop in zip(packing.document_P, packing.start_P, packing.stop_P, strict=True)
        for at in range(start, stop - 1)
    )
    assert steps == Counter((document, at) for document, length in enumerate(lengths) for at in range(length - 1))
    pieces = Counter(packing.document_P.tolist())
    assert all(pieces[document] == 1 for document, length in enumerate(lengths) if 2 <= length <= capacity)
    sizes_P = packing.stop_P - packing.start_P
    for sequence in range(len(packing)):
        first, end = packing.first_piece_S[sequence : sequence + 2]
        assert 0 < sizes_P[first:end].sum() <= capacity


def test_the_order_inside_a_sequence_is_mixed_and_repeats():
    lengths = np.random.default_rng(0).integers(2, 30, 2000)
    packing, again, other = (pack(lengths, 64, seed) for seed in (0, 0, 1))
    assert (packing.document_P == again.document_P).all() and (packing.document_P != other.document_P).any()
    sizes_P = packing.stop_P - packing.start_P
    inside = np.setdiff1d(np.arange(1, len(sizes_P)), packing.first_piece_S)
    steps = sizes_P[inside] - sizes_P[inside - 1]
    assert 0.4 < (steps[steps != 0] < 0).mean() < 0.6


def test_many_documents_pack_tightly():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.2, 200_000).astype(np.int64) + 2, 20_000)
    packing = pack(lengths, 4097, 0)
    used = (packing.stop_P - packing.start_P).sum() / (len(packing) * 4097)
    print(f"200,000 documents in {len(packing)} sequences, {1 - used:.5%} of them padding")
    assert used > 0.999


@pytest.mark.slow
def test_ten_million_documents_are_packed_in_seconds():
    import time

    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.2, 10_000_000).astype(np.int64) + 2, 20_000)
    started = time.process_time()
    packing = pack(lengths, 4097, 0)
    seconds = time.process_time() - started
    print(f"10,000,000 documents in {len(packing)} sequences: {seconds:.1f} s")
    assert seconds < 60
