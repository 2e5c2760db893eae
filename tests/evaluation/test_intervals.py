"""Intervals against published figures and their own promises."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.evaluation import intervals
from megatron_r1.evaluation.intervals import Interval, bootstrap, clustered, wilson


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_intervals(successes, total, low, high):
    interval = wilson(successes, total)
    assert interval.mean == successes / total
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=40))
def test_clustered_interval_holds_its_mean(prompt_means):
    interval = clustered(prompt_means)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.low < interval.high


def test_clustered_by_hand():
    # Means 0, 0.5, 1: mean 0.5, variance 0.25, standard error 0.5 / sqrt 3.
    interval = clustered([0.0, 0.5, 1.0] * 100)
    error = (50 / 299 / 300) ** 0.5
    assert interval == pytest.approx((0.5, 0.5 - 1.959964 * error, 0.5 + 1.959964 * error), abs=1e-6)


def test_responses_to_one_prompt_do_not_count_as_independent():
    alike = [1.0] * 50 + [0.0] * 50
    assert clustered(alike).low == pytest.approx(wilson(50, 100).low, abs=0.005)
    assert clustered(alike).low < wilson(200, 400).low


def test_clustered_covers_the_truth_about_19_times_in_20():
    generator = random.Random(3)
    hits = 0
    for _ in range(400):
        prompts = [generator.betavariate(0.6, 1.4) for _ in range(120)]
        means = [sum(generator.random() < p for _ in range(4)) / 4 for p in prompts]
        interval = clustered(means)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.915 <= hits / 400 <= 0.985


@pytest.mark.parametrize("count", [40, 150])
def test_bootstrap_covers_the_truth_about_19_times_in_20(count):
    draws = np.random.default_rng(5)
    shares_RP = draws.beta(0.6, 1.4, (400, count))
    means_RP = draws.binomial(4, shares_RP) / 4
    hits = [interval.low <= 0.3 <= interval.high for interval in bootstrap(means_RP)]
    assert 0.92 <= sum(hits) / len(hits) <= 0.98


def test_bootstrap_against_all_resamples():
    values = [0.0, 0.25, 0.5, 1.0, 1.0]
    every = np.sort(np.array(list(product(values, repeat=5))).mean(1))
    [interval] = bootstrap([values])
    assert interval.mean == pytest.approx(0.55)
    assert interval.low == pytest.approx(np.quantile(every, 0.025), abs=0.05)
    assert interval.high == pytest.approx(np.quantile(every, 0.975), abs=0.05)


def test_bootstrap_measures_have_intervals_of_their_own():
    lengths = [float(length) for length in range(100, 200)]
    shares, alike, words = bootstrap([[0.0, 1.0] * 50, [1.0] * 100, lengths])
    assert 0.38 < shares.low < 0.5 < shares.high < 0.62
    assert alike == wilson(100, 100)
    assert 140 < words.low < 149.5 < words.high < 160
    assert bootstrap([[7.0, 7.0]]) == [Interval(7.0, 7.0, 7.0)]
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap([[]])


def test_bootstrap_resamples_in_parts_of_bounded_memory(monkeypatch):
    values = [[0.0, 0.5, 1.0] * 20]
    whole = bootstrap(values)
    monkeypatch.setattr(intervals, "RESAMPLED_AT_ONCE", 60 * 7)
    assert bootstrap(values) == whole


def test_disjoint():
    assert Interval(0.2, 0.1, 0.3).disjoint(Interval(0.6, 0.5, 0.7))
    assert Interval(0.6, 0.5, 0.7).disjoint(Interval(0.2, 0.1, 0.3))
    assert not Interval(0.2, 0.1, 0.5).disjoint(Interval(0.6, 0.5, 0.7))


def test_bad_arguments_are_refused():
    for arguments in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson(*arguments)
    for means in ([], [1.5]):
        with pytest.raises(ValueError):
            clustered(means)
