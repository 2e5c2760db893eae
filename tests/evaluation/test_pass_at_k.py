"""pass@k and cons@k against enumeration of all subsets."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.evaluation.pass_at_k import cons_at_k, pass_at_k, sizes_up_to


def majority_is_right(votes) -> Fraction:
    """Whether 0, the true answer, has most of the votes; shared by answers with as many. None abstains."""
    counts = {vote: votes.count(vote) for vote in votes if vote is not None}
    winners = [vote for vote, count in counts.items() if count == max(counts.values())]
    return Fraction(0 in winners, max(1, len(winners)))


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
    for correct in range(samples + 1):
        marks = [index < correct for index in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(combinations(marks, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels():
    samples, correct, k = 20_000, 3, 10_000
    exact = 1 - Fraction(comb(samples - correct, k), comb(samples, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(float(exact), rel=1e-11)
    assert pass_at_k(10**9, 1, 1) == pytest.approx(1e-9, rel=1e-6)
    assert pass_at_k(100, 0, 100) == 0 and pass_at_k(100, 1, 100) == 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 4), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 2), st.data())
def test_cons_at_k_is_the_mean_over_all_subsets(correct, wrong, abstained, data):
    votes = [0] * correct + [answer for answer, count in enumerate(wrong, 1) for _ in range(count)] + [None] * abstained
    if not votes:
        return
    k = data.draw(st.integers(1, len(votes)))
    subsets = list(combinations(votes, k))
    exact = sum(map(majority_is_right, subsets)) / Fraction(len(subsets))
    assert cons_at_k(correct, wrong, abstained, k) == pytest.approx(float(exact), abs=1e-14)


def test_ties_are_shared_and_responses_without_an_answer_do_not_vote():
    assert cons_at_k(2, [2], 0, 4) == pytest.approx(1 / 2)
    assert cons_at_k(2, [2, 2, 1], 0, 7) == pytest.approx(1 / 3)
    assert cons_at_k(1, [], 63, 64) == 1  # one vote is the majority of one
    assert cons_at_k(0, [], 64, 64) == 0 and cons_at_k(30, [31], 3, 64) == 0


def test_cons_at_k_of_many_samples_is_that_of_drawn_subsets():
    counts = [400, 300, 300, *[1] * 50, 100]
    drawn = np.random.default_rng(0).multivariate_hypergeometric(counts, 40, size=4000)[:, :-1]
    ties = (drawn == drawn.max(1, keepdims=True)).sum(1)
    wins = np.where(drawn[:, 0] == drawn.max(1), 1 / ties, 0.0)
    assert cons_at_k(400, counts[1:-1], 100, 40) == pytest.approx(wins.mean(), abs=4 * wins.std() / 4000**0.5)
    assert cons_at_k(700, [500], 0, 1) == pytest.approx(700 / 1200)
    assert cons_at_k(700, [500], 0, 1200) == 1


def test_sizes_are_powers_of_two_and_the_number_of_samples():
    assert sizes_up_to(1) == [1] and sizes_up_to(6) == [1, 2, 4, 6] and sizes_up_to(64)[-2:] == [32, 64]


@pytest.mark.parametrize("arguments", [(4, 2, 0), (4, 2, 5), (4, 5, 2), (4, -1, 2)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="k="):
        pass_at_k(*arguments)
    if 0 <= arguments[1] <= 4:
        with pytest.raises(ValueError, match="must lie between 1 and the 4 samples"):
            cons_at_k(arguments[1], [4 - arguments[1]], 0, arguments[2])
