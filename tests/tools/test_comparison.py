"""What the benchmarks share: ways take turns, and medians, spreads and ratios are those of the rounds."""

from __future__ import annotations

import time

import pytest

from tools.bench.comparison import alternate, describe, seconds_of, speed_ratios


def test_ways_take_turns_and_none_is_always_first():
    calls: list[str] = []

    def way(name: str, seconds: list[float]):
        def measure() -> float:
            calls.append(name)
            return seconds.pop(0)

        return measure

    found = alternate({"a": way("a", [9.0, 1.0, 2.0]), "b": way("b", [9.0, 4.0, 5.0])}, rounds=2)
    assert found == {"a": [1.0, 2.0], "b": [4.0, 5.0]}
    assert [calls[start : start + 2] for start in (0, 2, 4)] == [["b", "a"], ["a", "b"], ["b", "a"]]


def test_rounds_without_warm_up_are_all_measured():
    assert alternate({"a": lambda: 1.0}, rounds=3, warm_up=0) == {"a": [1.0] * 3}


def test_seconds_are_those_of_the_call():
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02))() < 2.0


def test_ratios_are_of_the_same_round():
    found = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 12.0]}
    assert speed_ratios(found, "ours", "theirs") == [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        speed_ratios({"ours": [1.0], "theirs": []}, "ours", "theirs")


def test_a_line_has_median_spread_rate_and_ratio():
    found = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 12.0]}
    assert describe(found, base="theirs", work=100, unit="tokens").splitlines() == [
        "ours    2 (1-4) s  50 tokens/s  2 (1-3) times the speed of theirs",
        "theirs  2 (2-12) s  50 tokens/s",
    ]
    assert describe(found, base="theirs").splitlines()[1] == "theirs  2 (2-12) s"
