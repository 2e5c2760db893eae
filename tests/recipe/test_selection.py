"""What is selected among rows that passed the filters: near duplicates, balance, quotas, pass rates and pairs."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.config.curate import CurateConfig, PairsConfig, PassRateConfig
from megatron_r1.recipe.candidate import RIGHT, UNKNOWN, WRONG
from megatron_r1.recipe.facts import FACTS, KEPT
from megatron_r1.recipe.near_duplicates import near_duplicates, signature
from megatron_r1.recipe.pairs import preference_pairs
from megatron_r1.recipe.pass_rates import pass_rates
from megatron_r1.recipe.screening import Screened
from megatron_r1.recipe.selection import select

REASONS = ("bad_row", "language", "right")
DOMAINS = {"math": 0, "general": 1}


def screened(*rows: dict) -> Screened:
    """Rows with facts given by name; the others are those of different rows that passed all filters."""
    facts = np.zeros(len(rows), dtype=FACTS)
    for index, row in enumerate(rows):
        default = {"prompt": index, "text": index, "numbers": index, "length": 10, "reward": np.nan, "verdict": RIGHT}
        for name, value in (default | {"reason": KEPT} | row).items():
            facts[index][name] = REASONS.index(value) if value in REASONS else value
    signatures = np.random.default_rng(0).integers(0, 2**32, (len(rows), 64), dtype=np.uint32)
    return Screened(facts, REASONS, ("s",), DOMAINS, [], {}, signatures[facts["reason"] == KEPT])


def kept(found: Screened, **config) -> list[int]:
    return select(found, CurateConfig(**config), seed=0).kept.tolist()


def words(text: str) -> list[str]:
    return text.split()


TEXT = "first I add the two numbers then I subtract the third one and so the result is fourteen which I check again"


@pytest.mark.parametrize(
    ("other", "group", "dropped"),
    [
        (TEXT, 1, [1]),
        (TEXT + " by hand", 1, [1]),
        (TEXT, 2, []),
        ("we multiply first since a product binds stronger than a sum and get the same result in another way", 1, []),
        ("", 1, []),
    ],
)
def test_near_duplicates_are_found_within_a_group(other, group, dropped) -> None:
    signatures = np.stack([signature(words(TEXT)), signature(words(other))])
    assert near_duplicates(signatures, np.array([1, group]), 0.7).tolist() == dropped


def test_equal_words_estimate_the_share_of_common_sequences() -> None:
    rng = np.random.default_rng(1)
    for common in (0.3, 0.6, 0.9):
        estimates = []
        for _ in range(50):
            text = [str(number) for number in rng.integers(0, 10**6, 400)]
            other = text[: int(400 * common)] + [str(number) for number in rng.integers(0, 10**6, 400)]
            shared = int(400 * common) - 2
            true = shared / (398 + len(other) - 2 - shared)
            estimates.append((signature(text) == signature(other)).mean() - true)
        assert abs(np.mean(estimates)) < 0.03


def test_duplicates_and_rows_without_a_response_are_dropped() -> None:
    assert kept(screened({}, {"text": 0}, {"length": 0}, {"reason": "language"}, {})) == [0, 4]


@pytest.mark.parametrize(("prefer", "expected"), [("short", [1, 2, 4]), ("reward", [0, 3, 4]), ("random", None)])
def test_balance_keeps_the_preferred_rows_of_each_prompt(prefer, expected) -> None:
    rows = [
        {"prompt": 7, "length": 9, "reward": 1.0},
        {"prompt": 7, "length": 3, "reward": 0.5},
        {"prompt": 7, "length": 5, "reward": 0.1},
        {"prompt": 7, "length": 8},
        {"prompt": 8},
    ]
    rows[3]["reward"] = 0.9
    found = kept(screened(*rows), per_prompt=2, prefer=prefer)
    assert found == expected if expected else len(found) == 3 and 4 in found


def test_quotas_draw_and_name_no_row_of_other_domains() -> None:
    rows = [{"domain": index % 2} for index in range(40)]
    found = kept(screened(*rows), quotas={"math": 5})
    assert sum(row % 2 == 0 for row in found) == 5 and sum(row % 2 for row in found) == 20
    assert kept(screened(*rows), quotas={"math": 5}) == found, "drawn by the seed alone"
    assert len(kept(screened(*rows), quotas={"math": 50, "general": 0, "absent": 3})) == 20


def test_prompts_that_teach_nothing_are_dropped() -> None:
    rows = [{"prompt": prompt, "verdict": verdict} for prompt, verdict in [
        (5, RIGHT), (6, RIGHT), (5, WRONG), (6, RIGHT), (7, WRONG), (8, UNKNOWN), (5, RIGHT)]]  # fmt: skip
    found = screened(*rows)
    rates = pass_rates(found.facts, np.ones(7, dtype=bool), PassRateConfig())
    assert rates.rows.tolist() == [0] and rates.rate(0) == pytest.approx(2 / 3) and rates.samples.tolist() == [3]
    assert [(step.name, step.dropped.tolist()) for step in rates.steps] == [
        ("few_samples", [5]), ("always_right", [1]), ("always_wrong", [4]),
    ]  # fmt: skip
    everything = PassRateConfig(min_samples=0, drop_always_right=False, drop_always_wrong=False)
    rates = pass_rates(found.facts, np.ones(7, dtype=bool), everything)
    assert [rates.rate(index) for index in range(4)] == [pytest.approx(2 / 3), 1.0, 0.0, None]


def pairs_of(*rows: dict, **config) -> list[tuple[int, int]]:
    found = screened(*rows)
    rows_kept = select(found, CurateConfig(), seed=0).kept
    return [tuple(pair) for pair in preference_pairs(found, rows_kept, PairsConfig(**config), seed=0)]


def test_a_right_response_is_chosen_before_a_wrong_one_of_its_prompt() -> None:
    one = {"prompt": 1}
    wrong = one | {"verdict": WRONG, "reason": "right"}
    rows = [
        one,
        wrong,
        wrong | {"reason": "language"},
        {"prompt": 2},
        {"prompt": 3, "verdict": WRONG, "reason": "right"},
    ]
    assert pairs_of(*rows) == [(0, 1)]
    assert pairs_of(one, one | {"length": 11}, wrong, wrong | {"length": 12}, per_prompt=3) in (
        [(0, 2), (1, 3)], [(0, 3), (1, 2)])  # fmt: skip
    assert pairs_of(one, wrong | {"length": 99}) == [] and pairs_of(one, wrong | {"length": 99}, max_length_ratio=0)


def test_the_higher_reward_is_chosen_before_the_lower_by_a_margin() -> None:
    rows = [{"prompt": 1, "reward": reward} for reward in (0.2, 0.9, 0.5, 0.85)] + [{"prompt": 1}]
    assert pairs_of(*rows, by="reward") == [(1, 0)]
    assert pairs_of(*rows, by="reward", per_prompt=5) == [(1, 0), (3, 2)]
    assert pairs_of(*rows, by="reward", per_prompt=5, margin=0.4) == [(1, 0)]
    assert pairs_of(*rows, by="reward", margin=0.8) == []
