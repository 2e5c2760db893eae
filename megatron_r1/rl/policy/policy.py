"""Log-probabilities of responses under a model, on any layout of ranks; and those that a rollout's updates leave alone.

Shapes: B responses of a micro-batch, L positions of the longest, T inputs of all, end to end, D width, V this rank's
part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_r1.config.rl import RLConfig
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import forward_only
from megatron_r1.model.replay import NoReplay, Replay
from megatron_r1.model.scores import last_hidden_states, model_scores
from megatron_r1.model.vocab_parallel import ReferenceHidden, TokenScores
from megatron_r1.parallel.mesh import is_last_stage
from megatron_r1.rl.objective.kl import EXACT
from megatron_r1.rl.policy.batch import PerSample, ResponseBatch, most_inputs
from megatron_r1.rl.policy.reference import FixedPolicy


class Policy:
    """A model as a distribution over responses."""

    def __init__(self, model: Model, temperature: float, replay: Replay | None = None, vocab_size: int | None = None):
        """
        Args:
            temperature: the engine's sampling temperature.
            replay: makes routers use the experts that the engine recorded; None lets them choose.
            vocab_size: rows of the head that count; None counts all of them.
        """
        self._model, self.temperature, self._replay = model, temperature, replay or NoReplay()
        self._vocab_size = vocab_size

    def scores(
        self, model: Any, batch: ResponseBatch, reference: ReferenceHidden | None = None
    ) -> TokenScores | Tensor:
        """Scores [B, L] of the batch's targets on the last pipeline stage; the stage's hidden states on others.

        Args:
            model: the model, wrapped as the schedule passes it.
            reference: another model's hidden states [T, 1, D] and head, for the exact divergence to it.
        """
        scores = self._scores_1T(model, batch, reference)
        if not isinstance(scores, TokenScores):
            return scores
        log_probs_1T, entropy_1T, divergence_1T = scores
        divergence_BL = None if divergence_1T is None else batch.rows(divergence_1T)
        return TokenScores(batch.rows(log_probs_1T), batch.rows(entropy_1T), divergence_BL)

    def _scores_1T(  # noqa: N802 (a tensor's shape)
        self, model: Any, batch: ResponseBatch, reference: ReferenceHidden | None = None
    ) -> TokenScores | Tensor:
        """The same [1, T], as the model computes them."""
        with (
            self._replay.replaying(batch.experts_1TNK, backward=torch.is_grad_enabled()),
            without_multi_token_prediction(self._model),
        ):
            return model_scores(
                model,
                batch.inputs_1T,
                batch.positions_1T,
                batch.targets_1T,
                temperature=self.temperature,
                vocab_size=self._vocab_size,
                reference=reference,
                packed_seq_params=batch.packed,
            )

    def logprobs_by_sample(self, micro_batches: Sequence[ResponseBatch]) -> PerSample:
        """Each sample's log-probabilities [L] under the current weights, without gradient.

        Empty except on the last pipeline stage.
        """

        def forward(model: Any, batch: ResponseBatch) -> Tensor:
            output = self._scores_1T(model, batch)
            return output.log_probs if isinstance(output, TokenScores) else output

        return outputs_by_sample(self._model, micro_batches, forward)

    def hidden_by_sample(self, micro_batches: Sequence[ResponseBatch]) -> PerSample:
        """Each sample's last hidden states [L, D], likewise: what the exact divergence to this policy needs."""

        def forward(model: Any, batch: ResponseBatch) -> Tensor:
            with (
                self._replay.replaying(batch.experts_1TNK, backward=False),
                without_multi_token_prediction(self._model),
            ):
                return last_hidden_states(model, batch.inputs_1T, batch.positions_1T, packed_seq_params=batch.packed)

        return outputs_by_sample(self._model, micro_batches, forward)

    def divergence_by_sample(
        self, micro_batches: Sequence[ResponseBatch], reference: Callable[[ResponseBatch], ReferenceHidden | None]
    ) -> PerSample:
        """Each sample's exact divergence [L] to another model at each position, likewise."""

        def forward(model: Any, batch: ResponseBatch) -> Tensor:
            output = self._scores_1T(model, batch, reference(batch) if is_last_stage() else None)
            if not isinstance(output, TokenScores):
                return output
            assert output.divergence is not None
            return output.divergence

        return outputs_by_sample(self._model, micro_batches, forward)


def outputs_by_sample(
    model: Model, micro_batches: Sequence[ResponseBatch], forward: Callable[[Any, ResponseBatch], Tensor]
) -> PerSample:
    """Each sample's part of the output of `forward`, [1, T] or [1, T, D]; empty except on the last pipeline stage."""
    outputs = forward_only(model, micro_batches, forward, most_inputs(micro_batches))
    result: PerSample = {}
    for batch, output_1T in zip(micro_batches, outputs, strict=False):
        result |= batch.by_sample(output_1T)
    return result


@dataclass(frozen=True)
class FrozenLogProbs:
    """Log-probabilities of a rollout's samples from before its first update: of the old policy and of the reference.

    None where they are not needed; empty except on the last pipeline stage.
    """

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
        hidden_1TD = batch.gather_end_to_end(self.reference_hidden)
        return ReferenceHidden(hidden_1TD.transpose(0, 1), self.reference_head_VD)


def compute_frozen_logprobs(
    config: RLConfig,
    policy: Policy,
    reference: FixedPolicy | None,
    micro_batches: Sequence[ResponseBatch],
) -> FrozenLogProbs:
    """Collective: the forward passes that the configuration needs.

    Args:
        reference: None where no KL penalty is configured.
    """
    old = policy.logprobs_by_sample(micro_batches) if config.old_logprobs_from == "trainer" else None
    if reference is None:
        return FrozenLogProbs(old)
    with reference.in_place() as model:
        # The reference is another model: its routers choose for themselves.
        reference_policy = Policy(model, policy.temperature, vocab_size=reference.vocab_size)
        if config.kl_estimator != EXACT:
            return FrozenLogProbs(old, reference_policy.logprobs_by_sample(micro_batches))
        hidden = reference_policy.hidden_by_sample(micro_batches)
        return FrozenLogProbs(old, None, hidden, reference.head() if is_last_stage() else None)
