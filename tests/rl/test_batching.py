"""Batches hold every sample once and keep to their budget."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.train.batching import micro_batches_by_tokens, shuffle_into_mini_batches


@given(st.integers(1, 200), st.data(), st.integers(0, 2**32))
def test_every_sample_is_in_one_mini_batch(num_samples, data, seed):
    mini_batches = data.draw(st.integers(1, num_samples))
    batches = shuffle_into_mini_batches(num_samples, mini_batches, seed)
    assert len(batches) == mini_batches
    assert sorted(np.concatenate(batches)) == list(range(num_samples))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_mini_batches_follow_the_seed():
    batches = [np.concatenate(shuffle_into_mini_batches(64, 2, seed)).tolist() for seed in (3, 3, 4, (3, 1), (3, 1))]
    assert batches[0] == batches[1] != batches[2]
    assert batches[3] == batches[4] != batches[0]
    assert batches[0] != list(range(64))


def test_more_mini_batches_than_samples_is_refused():
    with pytest.raises(ValueError, match="mini_batches=3"):
        shuffle_into_mini_batches(2, 3, 0)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 200))
def test_micro_batches_keep_to_the_budget(lengths, budget):
    batches = micro_batches_by_tokens(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in batch) <= budget for batch in batches if len(batch) > 1)
    by_length = [lengths[row] for batch in batches for row in batch]
    assert by_length == sorted(lengths, reverse=True)
    assert batches == micro_batches_by_tokens(lengths, budget)
    for batch, after in pairwise(batches):
        assert sum(lengths[row] for row in [*batch, after[0]]) > budget, "the next row would still have fitted"


def test_micro_batches_of_a_small_case():
    assert micro_batches_by_tokens([3, 10, 2, 3, 25, 1], 12) == [[4], [1], [0, 3, 2, 5]]
    assert micro_batches_by_tokens([9, 1, 1, 1, 2], 12) == [[0, 4, 1], [2, 3]]
    assert micro_batches_by_tokens([], 12) == []
