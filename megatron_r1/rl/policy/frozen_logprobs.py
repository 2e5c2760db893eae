"""What stays fixed while a rollout is learned from: what the sampling policy and the reference say of its answers.

Shapes: B answers of a micro-batch, L positions, D width, V this rank's rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.config.rl import RLConfig
from megatron_r1.model.chunks import Model
from megatron_r1.model.scores import head_weight
from megatron_r1.model.vocab_parallel import ReferenceHidden
from megatron_r1.parallel.comm import merge_by_key
from megatron_r1.parallel.mesh import is_last_stage, is_metrics_rank
from megatron_r1.rl.objective.kl import EXACT
from megatron_r1.rl.objective.objective import penalty
from megatron_r1.rl.policy.batch import ResponseBatch, response_part
from megatron_r1.rl.policy.policy import Policy, pad_to_batch
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.rollout.sample import Sample

BySample = dict[int, Tensor]
"""Values of this rank's samples, by position of the row."""


@dataclass(frozen=True)
class FrozenLogProbs:
    """None for what is not needed. On the last pipeline stage; elsewhere without samples."""

    old: BySample | None
    """Log-probabilities by the trainer's weights at the start of the rollout."""
    reference: BySample | None
    """Log-probabilities by the reference policy."""
    reference_hidden: BySample | None
    """The reference's last hidden states [L, D], where its whole distribution is needed."""
    reference_head_VD: Tensor | None

    def old_rows(self, rows: ResponseBatch) -> Tensor:
        """What the ratio is taken to: the trainer's own log-probabilities, else the engine's."""
        return rows.rollout_log_probs_BL if self.old is None else pad_to_batch(self.old, rows)

    def reference_rows(self, rows: ResponseBatch) -> Tensor | None:
        return None if self.reference is None else pad_to_batch(self.reference, rows)

    def other(self, rows: ResponseBatch) -> ReferenceHidden | None:
        """The reference's whole distribution at these rows."""
        if self.reference_hidden is None or self.reference_head_VD is None:
            return None
        return ReferenceHidden(pad_to_batch(self.reference_hidden, rows).transpose(0, 1), self.reference_head_VD)


def compute_frozen_logprobs(
    config: RLConfig,
    model: Model,
    policy: Policy,
    reference_policy: Policy,
    reference: ReferencePolicy | None,
    rows: Sequence[ResponseBatch],
) -> FrozenLogProbs:
    """Collective: the passes that the configuration needs, before the first update.

    Args:
        reference_policy: the model, as the reference reads: it routes for itself.
    """
    old = policy.log_probs_by_sample(rows) if config.old_logprobs_from == "trainer" else None
    if not (reference and config.kl_coefficient):
        return FrozenLogProbs(old, None, None, None)
    with reference.in_place():
        if config.kl_estimator != EXACT:
            return FrozenLogProbs(old, reference_policy.log_probs_by_sample(rows), None, None)
        hidden = reference_policy.hidden_by_sample(rows)
        return FrozenLogProbs(old, None, hidden, head_weight(model).detach().clone() if is_last_stage() else None)


def token_penalties(
    config: RLConfig, samples: Sequence[Sample], policy: Policy, told: FrozenLogProbs, rows: Sequence[ResponseBatch]
) -> BySample:
    """Collective: KL(policy || reference) at every token of an answer, in nats, before the first update.

    What DeepSeekMath's equation 2 takes from the rewards of tokens, whether they are learned from or not. On the last
    pipeline stage; elsewhere without samples.
    """
    if config.kl_estimator == EXACT:
        divergence = policy.divergence_by_sample(rows, told.other)
        return {index: response_part(samples[index], values_L) for index, values_L in divergence.items()}
    mine: BySample = {}
    for index, reference_L in (told.reference or {}).items():
        sample = samples[index]
        anchor_1L = response_part(sample, reference_L)[None]
        own_1L = anchor_1L.new_tensor(sample.logprobs)[None]
        if told.old is not None:
            own_1L = response_part(sample, told.old[index])[None]
        everything_1L = torch.ones_like(own_1L, dtype=torch.bool)
        mine[index] = penalty(config.kl_estimator, own_1L, anchor_1L, everything_1L)[0]
    return mine


def sum_per_response(by_token: BySample, count: int) -> Tensor:
    """Collective: what `penalties_of_tokens` gives, summed over each answer of the rollout: [samples], everywhere."""
    mine = {index: float(values_L.sum()) for index, values_L in by_token.items()}
    everyone = merge_by_key(mine if is_metrics_rank() else {})
    return torch.tensor([everyone[index] for index in range(count)])
