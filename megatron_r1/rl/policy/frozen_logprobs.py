"""Old-policy and reference log-probabilities, computed once per rollout before its first update.

Shapes: B responses of a micro-batch, L positions, D width, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_r1.config.rl import RLConfig
from megatron_r1.model.chunks import Model
from megatron_r1.model.scores import head_weight
from megatron_r1.model.vocab_parallel import ReferenceHidden
from megatron_r1.parallel.mesh import is_last_stage
from megatron_r1.rl.objective.kl import EXACT
from megatron_r1.rl.policy.batch import PerSample, ResponseBatch
from megatron_r1.rl.policy.policy import Policy
from megatron_r1.rl.policy.reference import ReferencePolicy


@dataclass(frozen=True)
class FrozenLogProbs:
    """Log-probabilities of a rollout's samples; None where they are not needed. Empty except on the last stage."""

    old: PerSample | None
    """Log-probabilities by the trainer's weights at the start of the rollout; without them the engine's are used."""
    reference: PerSample | None = None
    """Log-probabilities by the reference policy."""
    reference_hidden: PerSample | None = None
    """The reference's last hidden states [L, D], where its whole distribution is needed."""
    reference_head_VD: Tensor | None = None

    def reference_distribution(self, batch: ResponseBatch) -> ReferenceHidden | None:
        """The reference's distribution over the whole vocabulary for this batch."""
        if self.reference_hidden is None or self.reference_head_VD is None:
            return None
        return ReferenceHidden(batch.gather(self.reference_hidden).transpose(0, 1), self.reference_head_VD)


def compute_frozen_logprobs(
    config: RLConfig,
    model: Model,
    policy: Policy,
    reference: ReferencePolicy | None,
    micro_batches: Sequence[ResponseBatch],
) -> FrozenLogProbs:
    """Collective: the forward passes that the configuration needs.

    Args:
        reference: None where no KL penalty is configured.
    """
    old = policy.logprobs_by_sample(micro_batches) if config.old_logprobs_from == "trainer" else None
    if reference is None:
        return FrozenLogProbs(old)
    # The reference is another model: its routers choose for themselves.
    reference_policy = Policy(model, policy.temperature)
    with reference.in_place():
        if config.kl_estimator != EXACT:
            return FrozenLogProbs(old, reference_policy.logprobs_by_sample(micro_batches))
        hidden = reference_policy.hidden_by_sample(micro_batches)
        return FrozenLogProbs(old, None, hidden, head_weight(model).detach().clone() if is_last_stage() else None)
