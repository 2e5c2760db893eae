"""Distillation from a teacher: its K most likely tokens at every position in the loss, and the loss that uses them.

Before an update the teacher runs on all of the rank's micro-batches. The last pipeline stage, which computes the loss,
stores its K log-probabilities at each position in the loss.

Shapes: L positions of B sequences, T all of them concatenated, N tokens in the loss of a micro-batch, K tokens of the
teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_r1.config.sft import TeacherConfig
from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import LossFunction, forward_only
from megatron_r1.model.scores import LogProbQuery, model_topk_logprobs, selected_scores
from megatron_r1.model.vocab_parallel_topk import TopKLogProbs
from megatron_r1.sft.distillation_loss import distillation_loss
from megatron_r1.sft.supervised import SupervisedReader, end_to_end
from megatron_r1.train.packed import PackedMicroBatch


class Teacher:
    """A frozen model that gives its most likely tokens."""

    def __init__(self, model: Model, top_k: int, temperature: float, vocab_size: int):
        """
        Args:
            model: the bare model, frozen, divided among the ranks by the student's process groups.
            top_k: tokens that it gives for a position.
            temperature: of its probabilities.
            vocab_size: size of the vocabulary; entries of its head beyond it have no probability.
        """
        model.requires_grad_(False)
        model.eval()
        self._model = model
        self._top_k, self._temperature, self._vocab_size = top_k, temperature, vocab_size

    def topk_logprobs(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TopKLogProbs]:
        """Its most likely tokens at the trained-on positions of each micro-batch; empty but on the last pipeline stage.

        Collective over the ranks that hold one model.
        """

        def forward(model: Any, batch: PackedMicroBatch) -> Tensor | dict[str, Tensor]:
            inputs_1T, positions_1T, packed = end_to_end(batch)
            with without_multi_token_prediction(self._model):
                topk = model_topk_logprobs(
                    model,
                    inputs_1T,
                    positions_1T,
                    trained_on(batch),
                    self._top_k,
                    temperature=self._temperature,
                    vocab_size=self._vocab_size,
                    packed_seq_params=packed,
                )
            # megatron-core looks at the device of a tensor, or of a dictionary's first.
            return topk._asdict() if isinstance(topk, TopKLogProbs) else topk

        longest = max(batch.document_ids_BL.numel() for batch in micro_batches)
        return [TopKLogProbs(**topk) for topk in forward_only(self._model, micro_batches, forward, longest)]


@dataclass(frozen=True)
class DistillationMicroBatch(PackedMicroBatch):
    """A micro-batch with the teacher's most likely tokens."""

    topk: TopKLogProbs | None
    """At the trained-on positions, [N, K]; None but on the last pipeline stage."""


class DistillingReader(SupervisedReader):
    """Turns batches of packed examples into micro-batches with a teacher's log-probabilities, and runs the student.

    Beside the loss it logs the cross-entropy of the data's tokens and the distillation loss, the divergence of the
    student from the teacher.
    """

    def __init__(self, teacher: Teacher, settings: TeacherConfig, vocab_size: int | None, mtp_layers: int, device: str):
        """
        Args:
            vocab_size: size of the vocabulary, where the student's head has entries beyond it; they do not count in the
                divergence, but do in the cross-entropy, as without a teacher.
            mtp_layers: number of multi-token prediction layers, whose own loss is the same as without a teacher.
        """
        super().__init__(True, mtp_layers, device)
        self._teacher, self._settings, self._vocab_size = teacher, settings, vocab_size

    def micro_batches(self, batch: ChatBatch, rank: int, ranks: int, size: int) -> list[PackedMicroBatch]:
        """This data-parallel rank's share of a global batch, with the teacher's tokens. Collective."""
        micro_batches = super().micro_batches(batch, rank, ranks, size)
        found: list[TopKLogProbs | None] = [*self._teacher.topk_logprobs(micro_batches)] or [None] * len(micro_batches)
        pairs = zip(micro_batches, found, strict=True)
        return [DistillationMicroBatch(**vars(micro_batch), topk=topk) for micro_batch, topk in pairs]

    def forward(self, model: Any, batch: PackedMicroBatch) -> tuple[Tensor, LossFunction]:
        """For each trained-on position the log-probabilities of the data's token and of the teacher's, [N, 1 + K]."""
        assert isinstance(batch, DistillationMicroBatch)
        query = partial(selected_scores, selected_BL=trained_on(batch), queries=self._queries(batch))
        output = self.run(model, batch, query)
        if isinstance(output, list):
            output = torch.cat([scores.log_probs for scores in output], -1)
        return output, partial(self._loss, batch)

    def _queries(self, batch: DistillationMicroBatch) -> list[LogProbQuery]:
        """The data's token, and the teacher's tokens; one query where both are of one softmax."""
        if batch.topk is None:
            return []
        target_N1 = batch.tokens_BL[:, 1:][batch.loss_mask_BL.bool()][:, None]
        if self._settings.temperature == 1 and self._vocab_size is None:
            return [LogProbQuery(torch.cat([target_N1, batch.topk.ids], -1))]
        return [
            LogProbQuery(target_N1),
            LogProbQuery(batch.topk.ids, self._settings.temperature, self._vocab_size),
        ]

    def _loss(self, batch: DistillationMicroBatch, log_probs_NX: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.topk is not None
        settings = self._settings
        divergence_N = distillation_loss(log_probs_NX[:, 1:], batch.topk.log_probs, settings.tail, settings.temperature)
        cross_entropy, divergence = -log_probs_NX[:, 0].sum() * batch.weight, divergence_N.sum() * batch.weight
        loss = (1 - settings.weight) * cross_entropy + settings.weight * divergence
        logged = {"train/loss": loss.detach(), "train/cross_entropy": cross_entropy.detach()}
        return loss, {**logged, "train/distillation_loss": divergence.detach()}


def trained_on(batch: PackedMicroBatch) -> Tensor:
    """Which of the tokens, laid end to end, are followed by one that counts in the loss: bool [1, T]."""
    return batch.loss_mask_BL.bool().reshape(1, -1)
