"""What each answer, or each of its tokens, is credited with: where advantages come from.

Shapes: B answers of a micro-batch, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_r1.rl.advantage import ragged_group_advantages
from megatron_r1.rl.fixed import BySample
from megatron_r1.rl.rows import Rows
from megatron_r1.rollout.sample import Sample


@dataclass(frozen=True)
class Taken:
    """A rollout that advantages are wanted of, before the first update."""

    samples: Sequence[Sample]
    """Whole groups, one after the other; the same on every rank."""
    rows: Sequence[Rows]
    """This rank's micro-batches, of all passes."""
    counted: frozenset[int]
    """Places of the samples that this rank speaks for: of data-parallel ranks, one does for each that is learned."""
    penalties: BySample | None = None
    """What the reward of each token of an answer loses; None where no penalty is in the reward."""
    penalty_sums: Tensor | None = None
    """The same summed over each answer, [samples], on every rank."""


class Credit(Protocol):
    """The advantages of one rollout, and what learns beside the policy in order to give them."""

    def on(self, rows: Rows) -> Tensor:
        """Advantages of a micro-batch: [B], or [B, L] where tokens have their own; on the last pipeline stage."""
        ...

    def learn(self, micro_batches: Sequence[Rows], tokens: int, share: float) -> bool:
        """Collective: one update on the mini-batch that the policy learns from too; whether its gradient was finite.

        Args:
            tokens: of the whole mini-batch that are learned from.
            share: of the peak learning rate.
        """
        ...

    def metrics(self) -> dict[str, Any]:
        """Collective: of the rollout, once all is learned; the same on every rank."""
        ...


class Advantages(Protocol):
    """A way to get advantages."""

    def of(self, taken: Taken) -> Credit:
        """Collective."""
        ...

    def policy_waits(self, rollouts: int) -> bool:
        """Whether the policy does not learn yet after so many rollouts."""
        ...


class GroupRelative:
    """An answer against the others to the same prompt (DeepSeekMath, section 4.1.2); a token has its answer's."""

    def __init__(self, std: str):
        """
        Args:
            std: of `group_advantages`.
        """
        self._std = std

    def of(self, taken: Taken) -> Credit:
        rewards = torch.tensor([sample.reward for sample in taken.samples])
        if taken.penalty_sums is not None:
            rewards = rewards - taken.penalty_sums
        sizes = [len(list(group)) for _, group in groupby(taken.samples, key=lambda sample: sample.group)]
        # On whole groups, though their answers are divided among mini-batches.
        return _OfAnswers(ragged_group_advantages(rewards, sizes, self._std))

    def policy_waits(self, rollouts: int) -> bool:
        return False


@dataclass(frozen=True)
class _OfAnswers:
    advantages: Tensor
    """[samples]."""

    def on(self, rows: Rows) -> Tensor:
        return self.advantages[rows.samples_B].to(rows.tokens_BL.device)

    def learn(self, micro_batches: Sequence[Rows], tokens: int, share: float) -> bool:
        return True

    def metrics(self) -> dict[str, Any]:
        return {}
