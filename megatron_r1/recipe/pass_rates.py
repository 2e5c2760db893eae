"""Pass rates: the share of a prompt's samples that are right; prompts that teach nothing are dropped.

A prompt whose samples are all right or all wrong gives no advantage to a group of responses (DAPO, section 3.2); the
pass rate of the others is their difficulty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_r1.config.curate import PassRateConfig
from megatron_r1.recipe.candidate import RIGHT, UNKNOWN
from megatron_r1.recipe.selection import SelectionStep

FEW_SAMPLES, ALWAYS_RIGHT, ALWAYS_WRONG, CONTAMINATION = (
    "few_samples", "always_right", "always_wrong", "contamination",
)  # fmt: skip


@dataclass
class PromptRates:
    """The prompts that are kept, in the order of their first rows."""

    rows: np.ndarray
    """[prompts] index of each prompt's first row."""
    samples: np.ndarray
    """[prompts] samples with a verdict."""
    right: np.ndarray
    """[prompts] samples that are right."""
    steps: list[SelectionStep]

    def rate(self, index: int) -> float | None:
        """Pass rate of prompt `index`; None without samples."""
        return float(self.right[index] / self.samples[index]) if self.samples[index] else None

    def drop(self, name: str, drop: np.ndarray) -> None:
        """Drop the prompts where `drop`, [prompts], is true."""
        self.steps.append(SelectionStep(name, len(self.rows), self.rows[drop]))
        self.rows, self.samples, self.right = self.rows[~drop], self.samples[~drop], self.right[~drop]


def pass_rates(facts: np.ndarray, readable: np.ndarray, config: PassRateConfig) -> PromptRates:
    """The pass rates of all prompts that are kept.

    Args:
        facts: [rows] of FACTS.
        readable: [rows] which rows could be read.
    """
    rows = np.flatnonzero(readable)
    _, first, prompt = np.unique(facts["prompt"][rows], return_index=True, return_inverse=True)
    verdicts = facts["verdict"][rows]
    samples, right = (
        np.bincount(prompt, weights=counted, minlength=len(first)).astype(np.int64)
        for counted in (verdicts != UNKNOWN, verdicts == RIGHT)
    )
    order = np.argsort(first)
    rates = PromptRates(rows[first[order]], samples[order], right[order], [])
    rates.drop(FEW_SAMPLES, rates.samples < config.min_samples)
    if config.drop_always_right:
        rates.drop(ALWAYS_RIGHT, (rates.samples > 0) & (rates.right == rates.samples))
    if config.drop_always_wrong:
        rates.drop(ALWAYS_WRONG, (rates.samples > 0) & (rates.right == 0))
    return rates
