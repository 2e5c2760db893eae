"""Advantage estimators: from a rollout's rewards to the advantage of each response, or of each of its tokens.

Shapes: B responses of a micro-batch, L positions, G responses of a group, R tokens of a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.rl.advantages.group_relative import process_advantages, ragged_group_advantages
from megatron_r1.rl.policy.batch import PerSample, ResponseBatch, at_positions
from megatron_r1.rl.policy.kl_penalty import RewardPenalties
from megatron_r1.rollout.sample import Sample


@dataclass(frozen=True)
class AdvantageInputs:
    """A rollout before its first update."""

    samples: Sequence[Sample]
    """Whole groups, one after the other; the same on every rank."""
    micro_batches: Sequence[ResponseBatch]
    """This rank's, of all epochs."""
    owned_samples: frozenset[int]
    """Indices of the samples that this rank counts in statistics: each trained sample counts on one data-parallel
    rank."""
    penalties: RewardPenalties | None = None
    """What a KL penalty takes from the rewards."""


@dataclass(frozen=True)
class ValueTargets:
    """What a critic is trained on; empty where there is none, and except on the last pipeline stage."""

    old_values: PerSample = field(default_factory=dict)
    """Its values before the first update."""
    returns: PerSample = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of values and returns, over all ranks."""


class RolloutAdvantages(Protocol):
    """The advantages of one rollout."""

    def for_batch(self, batch: ResponseBatch) -> Tensor:
        """Advantages of a micro-batch: [B], or [B, L] where each token has its own; on the last pipeline stage."""
        ...

    @property
    def value_targets(self) -> ValueTargets:
        """For the critic."""
        ...


class AdvantageEstimator(Protocol):
    """A way to estimate advantages."""

    def estimate(self, inputs: AdvantageInputs) -> RolloutAdvantages:
        """Collective."""
        ...


@dataclass(frozen=True)
class PerResponse:
    """Every token has its response's advantage."""

    advantages: Tensor
    """[samples]."""
    value_targets: ValueTargets = ValueTargets()

    def for_batch(self, batch: ResponseBatch) -> Tensor:
        return self.advantages[batch.indices_B].to(batch.tokens_BL.device)


@dataclass(frozen=True)
class PerToken:
    """Every token has an advantage of its own."""

    advantages: PerSample
    value_targets: ValueTargets = ValueTargets()

    def for_batch(self, batch: ResponseBatch) -> Tensor:
        return batch.gather(self.advantages).to(batch.tokens_BL.device)


class GroupAdvantages:
    """A response compared with the other responses to the same prompt (DeepSeekMath, section 4.1.2)."""

    def __init__(self, std: str):
        """
        Args:
            std: of `group_advantages`.
        """
        self._std = std

    def estimate(self, inputs: AdvantageInputs) -> PerResponse:
        # Computed on whole groups, although their responses are divided among mini-batches.
        sizes = [len(group) for group in _groups(inputs)]
        return PerResponse(ragged_group_advantages(_rewards(inputs), sizes, self._std))


class ProcessAdvantages:
    """Process supervision: a step compared with all steps of the responses to a prompt (DeepSeekMath, section 4.1.3).

    The reward of the whole response counts as one more step, which ends with the response. Without other steps, every
    token has the advantage that `GroupAdvantages` gives to the response.
    """

    def __init__(self, std: str):
        """
        Args:
            std: of `process_advantages`.
        """
        self._std = std

    def estimate(self, inputs: AdvantageInputs) -> PerToken:
        outcomes = _rewards(inputs).tolist()
        by_sample: PerSample = {}
        for group in _groups(inputs):
            samples = [inputs.samples[index] for index in group]
            ends = [[*(end for end, _ in s.steps), len(s.response_tokens) - 1] for s in samples]
            values = [[*(v for _, v in inputs.samples[index].steps), outcomes[index]] for index in group]
            longest = max(len(sample.response_tokens) for sample in samples)
            advantages_GR = process_advantages(values, ends, longest, self._std)
            by_sample |= {
                index: at_positions(s, row_R) for index, s, row_R in zip(group, samples, advantages_GR, strict=True)
            }
        return PerToken(by_sample)


def _rewards(inputs: AdvantageInputs) -> Tensor:
    """Of responses, [samples], less the penalties."""
    rewards = torch.tensor([sample.reward for sample in inputs.samples])
    return rewards if inputs.penalties is None else rewards - inputs.penalties.per_sample


def _groups(inputs: AdvantageInputs) -> list[list[int]]:
    """Indices of each group's samples."""
    indices = range(len(inputs.samples))
    return [list(group) for _, group in groupby(indices, key=lambda index: inputs.samples[index].group)]
