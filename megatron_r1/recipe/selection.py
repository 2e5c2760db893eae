"""Selects among rows that passed all filters of single rows: no duplicates, balanced over prompts, by quotas."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_r1.config.curate import CurateConfig
from megatron_r1.recipe.near_duplicates import near_duplicates
from megatron_r1.recipe.screening import KEPT, Screened

NO_RESPONSE, DUPLICATE, NEAR_DUPLICATE, PER_PROMPT, QUOTA = (
    "no_response", "duplicate", "near_duplicate", "per_prompt", "quota",
)  # fmt: skip


@dataclass(frozen=True)
class SelectionStep:
    """One step of the selection: how many rows entered it, and which it dropped."""

    name: str
    rows_in: int
    dropped: np.ndarray
    """[dropped] indices of rows."""


@dataclass
class Selection:
    """Which rows are kept."""

    kept: np.ndarray
    """[kept] indices of rows, ascending."""
    steps: list[SelectionStep] = field(default_factory=list)

    def drop(self, name: str, dropped: np.ndarray) -> None:
        """Drop rows, given by their indices."""
        self.steps.append(SelectionStep(name, len(self.kept), dropped))
        self.kept = np.setdiff1d(self.kept, dropped, assume_unique=True)


def select(screened: Screened, config: CurateConfig, seed: int) -> Selection:
    """The rows that are kept; `seed` decides what is drawn."""
    facts = screened.facts
    selection = Selection(np.flatnonzero(facts["reason"] == KEPT))
    selection.drop(NO_RESPONSE, selection.kept[facts["length"][selection.kept] == 0])
    if config.duplicates:
        selection.drop(DUPLICATE, repeated(facts["text"], selection.kept))
    if config.near_duplicates != "off":
        groups = facts["prompt" if config.near_duplicates == "prompt" else "numbers"][selection.kept]
        found = near_duplicates(screened.signatures_of(selection.kept), groups, config.near_share)
        selection.drop(NEAR_DUPLICATE, selection.kept[found])
    if config.per_prompt:
        selection.drop(PER_PROMPT, beyond(config, facts, selection.kept, np.random.default_rng([seed, 1])))
    if config.quotas:
        rng = np.random.default_rng([seed, 2])
        selection.drop(QUOTA, over_quota(config.quotas, screened, selection.kept, rng))
    return selection


def repeated(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose key an earlier one has."""
    _, first = np.unique(keys[rows], return_index=True)
    return np.delete(rows, first)


def beyond(config: CurateConfig, facts: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Those of `rows` that are more than `per_prompt` of their prompt, the least preferred ones."""
    ties = rng.permutation(len(rows))
    rewards = np.nan_to_num(facts["reward"][rows], nan=-np.inf)
    preference = {"random": ties, "short": facts["length"][rows], "reward": -rewards}[config.prefer]
    prompts = facts["prompt"][rows]
    order = np.lexsort([ties, preference, prompts])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(prompts[order])) + 1])
    sizes = np.diff(np.append(starts, len(order)))
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    return np.sort(rows[order[rank >= config.per_prompt]])


def over_quota(quotas: dict[str, int], screened: Screened, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Those of `rows` that exceed the quota of their domain, drawn at random."""
    dropped = [np.empty(0, dtype=np.int64)]
    for domain, quota in quotas.items():
        of_domain = rows[screened.in_domain(domain)[rows]]
        if len(of_domain) > quota:
            dropped.append(rng.permutation(of_domain)[quota:])
    return np.sort(np.concatenate(dropped))
