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

from megatron_r1.config.rl import RLConfig
from megatron_r1.rl.advantages.group_relative import process_advantages, ragged_group_advantages
from megatron_r1.rl.policy.batch import ResponseBatch, to_positions
from megatron_r1.rl.policy.frozen_logprobs import BySample
from megatron_r1.rl.policy.policy import pad_to_batch
from megatron_r1.rollout.sample import Sample


@dataclass(frozen=True)
class AdvantageInputs:
    """A rollout that advantages are wanted of, before the first update."""

    samples: Sequence[Sample]
    """Whole groups, one after the other; the same on every rank."""
    rows: Sequence[ResponseBatch]
    """This rank's micro-batches, of all passes."""
    owned_samples: frozenset[int]
    """Places of the samples that this rank speaks for: of data-parallel ranks, one does for each that is learned."""
    penalties: BySample | None = None
    """What the reward of each token of an answer loses; None where no penalty is in the reward."""
    penalty_sums: Tensor | None = None
    """The same summed over each answer, [samples], on every rank."""


class RolloutAdvantages(Protocol):
    """The advantages of one rollout, and what learns beside the policy in order to give them."""

    def on(self, rows: ResponseBatch) -> Tensor:
        """Advantages of a micro-batch: [B], or [B, L] where tokens have their own; on the last pipeline stage."""
        ...

    def learn(self, micro_batches: Sequence[ResponseBatch], tokens: int, share: float) -> bool:
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

    def of(self, taken: AdvantageInputs) -> RolloutAdvantages:
        """Collective."""
        ...

    def in_critic_warmup(self, rollouts: int) -> bool:
        """Whether the policy does not learn yet after so many rollouts."""
        ...


class GroupAdvantages:
    """An answer against the others to the same prompt (DeepSeekMath, section 4.1.2); a token has its answer's."""

    def __init__(self, std: str):
        """
        Args:
            std: of `group_advantages`.
        """
        self._std = std

    def of(self, taken: AdvantageInputs) -> RolloutAdvantages:
        # On whole groups, though their answers are divided among mini-batches.
        sizes = [len(group) for group in _groups(taken)]
        return PerResponse(ragged_group_advantages(_rewards(taken), sizes, self._std))

    def in_critic_warmup(self, rollouts: int) -> bool:
        return False


class ProcessAdvantages:
    """Process supervision: a step against all steps of the answers to the same prompt (DeepSeekMath, section 4.1.3).

    An answer's own reward is that of one more step, which ends with the answer; without any others, every token has
    the advantage that `GroupRelative` gives to the answer.
    """

    def __init__(self, std: str):
        """
        Args:
            std: of `process_advantages`.
        """
        self._std = std

    def of(self, taken: AdvantageInputs) -> RolloutAdvantages:
        outcomes = _rewards(taken).tolist()
        by_sample: BySample = {}
        for group in _groups(taken):
            samples = [taken.samples[place] for place in group]
            ends = [[*(end for end, _ in s.steps), len(s.response_tokens) - 1] for s in samples]
            values = [[*(v for _, v in taken.samples[place].steps), outcomes[place]] for place in group]
            longest = max(len(sample.response_tokens) for sample in samples)
            advantages_GR = process_advantages(values, ends, longest, self._std)
            by_sample |= {
                place: to_positions(s, row_R) for place, s, row_R in zip(group, samples, advantages_GR, strict=True)
            }
        return PerToken(by_sample)

    def in_critic_warmup(self, rollouts: int) -> bool:
        return False


def build_advantage_estimator(config: RLConfig) -> Advantages:
    """Answers, or their steps, against the other answers to the same prompt."""
    return (ProcessAdvantages if config.advantage_estimator == "process" else GroupAdvantages)(config.advantage_std)


def _rewards(taken: AdvantageInputs) -> Tensor:
    """Of answers, [samples], less the penalties that are in them."""
    rewards = torch.tensor([sample.reward for sample in taken.samples])
    return rewards if taken.penalty_sums is None else rewards - taken.penalty_sums


def _groups(taken: AdvantageInputs) -> list[list[int]]:
    """Places of each group's samples."""
    places = range(len(taken.samples))
    return [list(group) for _, group in groupby(places, key=lambda place: taken.samples[place].group)]


class _NothingElseLearns:
    """The policy alone is trained."""

    def learn(self, micro_batches: Sequence[ResponseBatch], tokens: int, share: float) -> bool:
        return True

    def metrics(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class PerResponse(_NothingElseLearns):
    advantages: Tensor
    """[samples]."""

    def on(self, rows: ResponseBatch) -> Tensor:
        return self.advantages[rows.samples_B].to(rows.tokens_BL.device)


@dataclass(frozen=True)
class PerToken(_NothingElseLearns):
    advantages: BySample

    def on(self, rows: ResponseBatch) -> Tensor:
        return pad_to_batch(self.advantages, rows).to(rows.tokens_BL.device)
