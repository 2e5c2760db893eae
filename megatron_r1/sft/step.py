"""The training step of supervised fine-tuning."""

from __future__ import annotations

import torch.distributed as dist

from megatron_r1.data.chat.batches import ChatBatches
from megatron_r1.parallel.mesh import all_gather_data_parallel, data_parallel_group
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.sft.supervised import SupervisedReader, packing_metrics
from megatron_r1.train.loop import Step
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import BatchOutcome, training_step
from megatron_r1.train.update import update


def supervised_step(run: TrainingRun, reader: SupervisedReader, batches: ChatBatches) -> Step:
    """The step of such a run: an update on the next batch."""
    settings, group = run.config.train, data_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    size = settings.global_batch_size

    def learn(state: TrainState, rate: float) -> BatchOutcome:
        batch = batches.batch(state.data_position, size)
        micro_batches = reader.micro_batches(batch, rank, ranks, settings.micro_batch_size)
        shape = reader.shape(settings.sequence_length, min(settings.micro_batch_size, size // ranks))
        result = update(run.model, run.optimizer, micro_batches, reader.forward, rate, *shape)
        metrics = packing_metrics(batch, ranks)
        return BatchOutcome(
            result=result,
            sequences=size,
            tokens=int(metrics["train/tokens"]),
            routed_tokens=sum(all_gather_data_parallel(sum(part.document_ids_BL.numel() for part in micro_batches))),
            metrics={
                **metrics,
                "train/loss_tokens": int(reader.loss_mask(batch).sum()),
                "train/epoch": min(state.data_position + size, batches.total) / batches.per_epoch,
            },
        )

    return training_step(run.config, learn, run.platform.device)
