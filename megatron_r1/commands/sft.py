"""sft: supervised fine-tuning on conversations, with the loss on answers alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.batches import ChatBatches
from megatron_r1.data.chat.encode import template_source
from megatron_r1.data.chat.store import TEMPLATE_KEY, Examples, open_examples
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.model.forward_backward import LossFunction, forward_only
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.context import context_parallel_group
from megatron_r1.parallel.mesh import all_gather_data_parallel, data_parallel_group, is_metrics_rank
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.initial_weights import initial_model
from megatron_r1.runs.training_run import TrainingRun, finish_run, limit_steps, training_run
from megatron_r1.sft.supervised import SupervisedReader, packing_metrics
from megatron_r1.sft.teacher_setup import distilling_reader, find_teacher
from megatron_r1.train.hooks.heldout import HeldoutHook
from megatron_r1.train.loop import Step, train
from megatron_r1.train.packed import PackedMicroBatch
from megatron_r1.train.routing import FROZEN
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import BatchOutcome, training_step
from megatron_r1.train.update import update

logger = logging.getLogger(__name__)

SHOWN = (
    *(
        "train/loss",
        "train/cross_entropy",
        "train/distillation_loss",
        "eval/loss",
        "train/gradient_norm",
        "train/learning_rate",
    ),
    *("train/packing_efficiency", "perf/tokens_per_second", "train/epoch"),
)


def run(config: RunConfig) -> None:
    """Fine-tune a model, or go on where its run stopped."""
    check(config)
    weights, tokenizer = initial_model(config)
    teacher = find_teacher(config, tokenizer)
    length = config.train.sequence_length
    examples = open_examples(config.sft, config.data, tokenizer, length, config.seed, run_folder(config))
    learned, heldout = batches_of(config, examples, tokenizer.pad)
    config = with_epoch_steps(config, learned.total)
    # Whoever loads the model later asks it in the words that it learned in.
    template = template_source(config.sft.chat_template, tokenizer, TEMPLATE_KEY)
    tokenizer = Tokenizer(tokenizer.backend, {**tokenizer.settings, "chat_template": template})
    with training_run(config, tokenizer, weights) as run:
        FROZEN.apply(run.model, 0)
        reader = reader_of(run)
        learning = distilling_reader(run, teacher) if teacher else reader
        first = []
        if heldout.total:
            settings, start = config.sft, run.state.step
            measure = HeldoutLoss(run, reader, heldout)
            first.append(HeldoutHook(measure, settings.eval_interval, config.train.steps, start))
        if dist.get_rank() == 0:
            logger.info("%s", ", ".join(f"{name} {count}" for name, count in examples.counts.items()))
        hooks = run.hooks(SHOWN, f"sft {config.name}", first=first)
        state = train(run.state, supervised_step(run, learning, learned), hooks, config.train.steps)
        finish_run(run, state)


def check(config: RunConfig) -> None:
    """Refuse what this stage cannot do.

    Raises:
        ConfigError: no dataset, or what contradicts the way that examples are packed.
    """
    if config.sft.source == "files" and not config.sft.datasets:
        raise ConfigError("sft.datasets", "{}", "must name a source: sft.datasets.NAME.path=FILE")
    ramp = config.train.schedule.batch_ramp
    if ramp.tokens:
        raise ConfigError("train.schedule.batch_ramp.tokens", ramp.tokens, "must be 0 in sft, where epochs are counted")
    if config.sft.packing != "none" and config.parallel.context > 1:
        raise ConfigError("sft.packing", config.sft.packing, "must be none where parallel.context is above 1")


def batches_of(config: RunConfig, examples: Examples, pad: int) -> tuple[ChatBatches, ChatBatches]:
    """What is learned, and what is measured."""
    settings, length = config.sft, config.train.sequence_length
    packed = settings.packing == "best_fit"
    learned = ChatBatches(examples, ~examples.heldout_N, length, packed, settings.epochs, pad, config.seed)
    return learned, ChatBatches(examples, examples.heldout_N, length, packed, 1, pad, config.seed)


def with_epoch_steps(config: RunConfig, sequences: int) -> RunConfig:
    """The same run with the steps that its epochs take, or fewer where train.steps says so."""
    return limit_steps(config, -(-sequences // config.train.global_batch_size))


def reader_of(run: TrainingRun) -> SupervisedReader:
    """What reads the batches."""
    config = run.config
    packed, degrees = config.sft.packing == "best_fit", config.parallel
    # Interleaved pipeline stages expect all micro-batches to be alike.
    trimmed_to = 0 if packed or degrees.virtual_pipeline > 1 else degrees.tensor * 2 * degrees.context
    return SupervisedReader(packed, config.model.mtp.num_layers, run.platform.device, trimmed_to)


def supervised_step(run: TrainingRun, reader: SupervisedReader, batches: ChatBatches) -> Step:
    """The step of fine-tuning: next batch, update, metrics."""
    config, settings = run.config, run.config.train
    group = data_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    size, length = settings.global_batch_size, settings.sequence_length

    def learn(state: TrainState, rate: float) -> BatchOutcome:
        batch = batches.batch(state.data_position, size)
        micro_batches = reader.micro_batches(batch, rank, ranks, settings.micro_batch_size)
        rows = min(settings.micro_batch_size, size // ranks)
        shape = reader.shape(length, rows)
        result = update(run.model, run.optimizer, micro_batches, reader.forward, rate, *shape)
        metrics = packing_metrics(batch, ranks)
        return BatchOutcome(
            result=result,
            sequences=size,
            tokens=int(metrics["train/tokens"]),
            routed_tokens=sum(all_gather_data_parallel(sum(part.document_ids_BL.numel() for part in micro_batches))),
            metrics={
                **metrics,
                "train/loss_tokens": int(reader.counted(batch).sum()),
                "train/epoch": min(state.data_position + size, batches.total) / batches.per_epoch,
            },
        )

    return training_step(config, learn, run.platform.device)


class HeldoutLoss:
    """Mean loss over the learned tokens of held-out examples, the same on every rank."""

    def __init__(self, run: TrainingRun, reader: SupervisedReader, batches: ChatBatches):
        self._run, self._reader, self._batches = run, reader, batches

    def __call__(self) -> float:
        settings, group = self._run.config.train, data_parallel_group()
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        total, targets = 0.0, 0
        for position in range(0, self._batches.total, settings.global_batch_size):
            batch = self._batches.batch(position, settings.global_batch_size)
            micro_batches = self._reader.micro_batches(batch, rank, ranks, settings.micro_batch_size)
            total += self._total(micro_batches)
            targets += int(self._reader.counted(batch).sum())
        mine = total if is_metrics_rank() else 0.0
        sharing = dist.get_world_size(context_parallel_group())
        return sum(all_gather_object(mine)) / sharing / max(1, targets)

    def _total(self, micro_batches: Sequence[PackedMicroBatch]) -> float:
        """Sum of the losses of this rank's targets; 0 but on the last pipeline stage."""
        functions: dict[int, LossFunction] = {}

        def forward(model: Any, rows: PackedMicroBatch) -> Tensor:
            output, functions[id(rows)] = self._reader.forward(model, rows)
            return output

        shape = self._reader.shape(self._run.config.train.sequence_length, len(micro_batches[0].tokens_BL))
        outputs = forward_only(self._run.model, micro_batches, forward, *shape)
        return sum(
            float(functions[id(rows)](output_BL)[1]["train/loss"]) / rows.weight
            for rows, output_BL in zip(micro_batches, outputs, strict=False)
        )
