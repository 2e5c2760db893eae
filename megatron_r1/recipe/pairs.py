"""Preference pairs from the samples of a prompt: right before wrong, or the higher reward before the lower.

The chosen response is one that the curation keeps, so it has passed every filter. A wrong response passed all filters
before the verdict: a pair differs in what is right, not in language or format. Lengths are comparable, as in the pairs
of R1's helpfulness reward model (DeepSeek-R1, Nature version, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_r1.config.curate import PairsConfig
from megatron_r1.recipe.candidate import RIGHT, WRONG
from megatron_r1.recipe.facts import KEPT
from megatron_r1.recipe.screening import Screened

VERDICT_FILTER = "right"


class Pair(NamedTuple):
    """Two rows of one prompt."""

    chosen: int
    rejected: int


def preference_pairs(screened: Screened, kept: np.ndarray, config: PairsConfig, seed: int) -> list[Pair]:
    """The pairs of all prompts, at most `per_prompt` of each; `seed` decides which.

    Args:
        kept: [kept] rows that the curation keeps.
    """
    facts = screened.facts
    chosen, rejected = _by_verdict(screened, kept) if config.by == "verdict" else (kept, kept)
    rng = np.random.default_rng([seed, 3])
    rejected = rng.permutation(rejected)
    by_prompt: dict[int, list[int]] = {}
    for row in rejected.tolist():
        by_prompt.setdefault(int(facts["prompt"][row]), []).append(row)
    pairs: list[Pair] = []
    counts: dict[int, int] = {}
    for row in _best_first(facts, chosen, config, rng):
        prompt = int(facts["prompt"][row])
        others = by_prompt.get(prompt, [])
        if counts.get(prompt, 0) >= config.per_prompt or (config.by == "reward" and row not in others):
            continue
        if (other := _partner(facts, row, others, config)) is not None:
            pairs.append(Pair(row, other))
            counts[prompt] = counts.get(prompt, 0) + 1
            by_prompt[prompt] = [each for each in others if each not in (row, other)]
    return sorted(pairs)


def _by_verdict(screened: Screened, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The right rows that are kept, and the wrong ones that nothing else drops; no text twice."""
    facts = screened.facts
    reasons = [KEPT, *(screened.reasons.index(name) for name in (VERDICT_FILTER,) if name in screened.reasons)]
    wrong = np.flatnonzero((facts["verdict"] == WRONG) & np.isin(facts["reason"], reasons))
    _, first = np.unique(facts["text"][wrong], return_index=True)
    return kept[facts["verdict"][kept] == RIGHT], wrong[np.sort(first)]


def _best_first(facts: np.ndarray, rows: np.ndarray, config: PairsConfig, rng: np.random.Generator) -> Iterator[int]:
    """Rows in random order; by reward, the highest first, without those that have none."""
    rows = rng.permutation(rows)
    if config.by == "reward":
        rows = rows[~np.isnan(facts["reward"][rows])]
        rows = rows[np.argsort(-facts["reward"][rows], kind="stable")]
    yield from rows.tolist()


def _partner(facts: np.ndarray, row: int, others: list[int], config: PairsConfig) -> int | None:
    """The response that `row` is chosen before: of the lowest reward, by reward, else of the nearest length."""
    length, reward = int(facts["length"][row]), float(facts["reward"][row])
    able = []
    for other in others:
        lower = reward - float(facts["reward"][other])
        longer, shorter = sorted((length, int(facts["length"][other])), reverse=True)
        ratio_ok = not config.max_length_ratio or longer <= config.max_length_ratio * max(shorter, 1)
        if other != row and ratio_ok and (config.by == "verdict" or (lower > 0 and lower >= config.margin)):
            able.append((-lower if config.by == "reward" else longer - shorter, other))
    return min(able)[1] if able else None
