"""What an advantage estimator takes and gives: a rollout's rewards; the advantage of each response or of each token.

Shapes: L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_r1.rl.policy.batch import PerSample, ResponseBatch
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


@dataclass(frozen=True)
class RolloutAdvantages:
    """The advantages of one rollout."""

    by_sample: PerSample
    """One number for all tokens of a response, or one for each position of its row, [L]."""
    value_targets: ValueTargets = ValueTargets()
    """For the critic."""


class AdvantageEstimator(Protocol):
    """A way to estimate advantages."""

    def estimate(self, inputs: AdvantageInputs) -> RolloutAdvantages:
        """Collective."""
        ...
