"""The loss of supervised fine-tuning on validation examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_r1.data.chat.batches import ChatBatches
from megatron_r1.model.forward_backward import LossFunction, forward_only
from megatron_r1.parallel.comm import sum_over_ranks
from megatron_r1.parallel.context import context_parallel_group
from megatron_r1.parallel.mesh import data_parallel_group, is_metrics_rank
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.sft.supervised import SupervisedReader
from megatron_r1.train.packed import PackedMicroBatch

LARGEST_EXPONENT = 700.0
"""Largest exponent whose exponential is finite in float64."""


class EvalLoss:
    """Mean loss over the trained-on tokens of validation examples, the same on every rank."""

    def __init__(self, run: TrainingRun, reader: SupervisedReader, batches: ChatBatches):
        self._run, self._reader, self._batches = run, reader, batches

    def __call__(self) -> dict[str, float]:
        """Collective: the loss in nats per token, and its exponential."""
        return loss_and_perplexity(self.loss())

    def loss(self) -> float:
        """Collective: the loss in nats per token."""
        settings, group = self._run.config.train, data_parallel_group()
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        total, targets = 0.0, 0
        for position in range(0, self._batches.total, settings.global_batch_size):
            batch = self._batches.batch(position, settings.global_batch_size)
            micro_batches = self._reader.micro_batches(batch, rank, ranks, settings.micro_batch_size)
            total += self._sum_of(micro_batches)
            targets += int(self._reader.loss_mask(batch).sum())
        sums = sum_over_ranks("eval", {"loss": total} if is_metrics_rank() else {})
        return sums["loss"] / dist.get_world_size(context_parallel_group()) / max(1, targets)

    def _sum_of(self, micro_batches: Sequence[PackedMicroBatch]) -> float:
        """Sum of the losses of this rank's targets; 0 except on the last pipeline stage."""
        functions: dict[int, LossFunction] = {}

        def forward(model: Any, batch: PackedMicroBatch) -> Tensor:
            output, functions[id(batch)] = self._reader.forward(model, batch)
            return output

        shape = self._reader.shape(self._run.config.train.sequence_length, len(micro_batches[0].tokens_BL))
        outputs = forward_only(self._run.model, micro_batches, forward, *shape)
        return sum(
            float(functions[id(batch)](output_BL)[1]["train/loss"]) / batch.weight
            for batch, output_BL in zip(micro_batches, outputs, strict=False)
        )


def loss_and_perplexity(loss: float) -> dict[str, float]:
    """The metrics of a validation loss in nats per token."""
    return {"eval/loss": loss, "eval/perplexity": math.exp(loss) if loss < LARGEST_EXPONENT else math.inf}
