"""Fine-tuning beside a teacher: its most likely words at every learned token, and the loss that has them in it.

Before an update the teacher reads all of the rank's micro-batches, as the student will. Of what it says no more is kept
than K words of a learned token, where the loss is computed: on the last pipeline stage.

Shapes: L positions of B sequences, T all of them end to end, N learned tokens of a micro-batch, K words of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_r1.config.sft import TeacherConfig
from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import forward_only
from megatron_r1.model.scores import LogProbQuery, model_topk_logprobs, selected_scores
from megatron_r1.model.vocab_parallel_topk import TopKLogProbs
from megatron_r1.sft.distillation_loss import distillation_loss
from megatron_r1.sft.supervised import SupervisedReader, end_to_end
from megatron_r1.train.packed import PackedMicroBatch


class Teacher:
    """A frozen model that says which words it would have written."""

    def __init__(self, model: Model, top_k: int, temperature: float, vocab_size: int):
        """
        Args:
            model: the bare model, shared out among the ranks by the student's process groups.
            top_k: words that it says of a token.
            temperature: of its probabilities.
            vocab_size: size of the vocabulary; what its head holds beyond has no probability.
        """
        model.requires_grad_(False)
        model.eval()
        self._model = model
        self._top_k, self._temperature, self._vocab_size = top_k, temperature, vocab_size

    def topk_logprobs(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TopKLogProbs]:
        """Its most likely words at the learned tokens of each micro-batch; none but on the last pipeline stage.

        Collective over the ranks that hold one model.
        """

        def forward(model: Any, rows: PackedMicroBatch) -> Tensor | dict[str, Tensor]:
            inputs_1T, positions_1T, apart = end_to_end(rows)
            with without_multi_token_prediction(self._model):
                said = model_topk_logprobs(
                    model,
                    inputs_1T,
                    positions_1T,
                    learned(rows),
                    self._top_k,
                    temperature=self._temperature,
                    vocab_size=self._vocab_size,
                    packed_seq_params=apart,
                )
            # megatron-core looks at the device of a tensor, or of a dictionary's first.
            return said._asdict() if isinstance(said, TopKLogProbs) else said

        longest = max(rows.document_ids_BL.numel() for rows in micro_batches)
        return [TopKLogProbs(**said) for said in forward_only(self._model, micro_batches, forward, longest)]


@dataclass(frozen=True)
class DistillationMicroBatch(PackedMicroBatch):
    """A micro-batch with what the teacher says of it."""

    said: TopKLogProbs | None
    """Its words at the learned tokens, [N, K]; None but on the last pipeline stage."""


class DistillingReader(SupervisedReader):
    """Turns batches of packed examples into micro-batches that a teacher has read, and runs the student on one.

    What it logs of a micro-batch beside the loss: the `cross_entropy` of the words that were written, and the
    `distillation_loss`, the divergence of the student from the teacher.
    """

    def __init__(self, teacher: Teacher, settings: TeacherConfig, vocab_size: int | None, mtp_layers: int, device: str):
        """
        Args:
            vocab_size: size of the vocabulary, where the student's head has rows beyond it; those are left out of the
                divergence, while the cross-entropy is over all rows as without a teacher.
            extra_predictions: layers of multi-token prediction, whose own loss stays as it is.
        """
        super().__init__(True, mtp_layers, device)
        self._teacher, self._settings, self._vocab_size = teacher, settings, vocab_size

    def micro_batches(self, batch: ChatBatch, rank: int, ranks: int, size: int) -> list[PackedMicroBatch]:
        """This data-parallel rank's share of a global batch, with the teacher's words; collective as `words_of`."""
        micro_batches = super().micro_batches(batch, rank, ranks, size)
        said: list[TopKLogProbs | None] = [*self._teacher.topk_logprobs(micro_batches)] or [None] * len(micro_batches)
        pairs = zip(micro_batches, said, strict=True)
        return [DistillationMicroBatch(**vars(rows), said=topk) for rows, topk in pairs]

    def forward(self, model: Any, rows: PackedMicroBatch) -> tuple[Tensor, Callable]:
        """Of each learned token the log-probabilities of the word that was written and of the teacher's, [N, 1 + K]."""
        assert isinstance(rows, DistillationMicroBatch)
        asked = partial(selected_scores, selected_BL=learned(rows), queries=self._questions(rows))
        output = self.ask(model, rows, asked)
        if isinstance(output, list):
            output = torch.cat([scores.log_probs for scores in output], -1)
        return output, partial(self._loss, rows)

    def _questions(self, rows: DistillationMicroBatch) -> list[LogProbQuery]:
        """The word that was written, and the teacher's words; one question where both are of one softmax."""
        if rows.said is None:
            return []
        written_N1 = rows.tokens_BL[:, 1:][rows.loss_mask_BL.bool()][:, None]
        if self._settings.temperature == 1 and self._vocab_size is None:
            return [LogProbQuery(torch.cat([written_N1, rows.said.ids], -1))]
        return [LogProbQuery(written_N1), LogProbQuery(rows.said.ids, self._settings.temperature, self._vocab_size)]

    def _loss(self, rows: DistillationMicroBatch, log_probs_NX: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.said is not None
        settings = self._settings
        divergence_N = distillation_loss(log_probs_NX[:, 1:], rows.said.log_probs, settings.tail, settings.temperature)
        cross_entropy, divergence = -log_probs_NX[:, 0].sum() * rows.weight, divergence_N.sum() * rows.weight
        loss = (1 - settings.weight) * cross_entropy + settings.weight * divergence
        logged = {"train/loss": loss.detach(), "train/cross_entropy": cross_entropy.detach()}
        return loss, {**logged, "train/distillation_loss": divergence.detach()}


def learned(rows: PackedMicroBatch) -> Tensor:
    """Which of the tokens, laid end to end, have a learned one after them: bool [1, T]."""
    return rows.loss_mask_BL.bool().reshape(1, -1)
