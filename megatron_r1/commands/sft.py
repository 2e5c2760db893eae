"""sft: supervised fine-tuning on conversations, with the loss on responses alone."""

from __future__ import annotations

import logging

import torch.distributed as dist

from megatron_r1.config.cross_checks import check_fp8_sequences
from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.batches import ChatBatches
from megatron_r1.data.chat.store import Examples, inference_tokenizer, open_examples
from megatron_r1.errors import ConfigError
from megatron_r1.model.fp8.tokens import token_multiple
from megatron_r1.parallel.phases import phase
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.initial_weights import initial_model
from megatron_r1.runs.post_training import begin_post_training, trained_weights
from megatron_r1.runs.training_run import TrainingRun, finish_run, limit_steps, training_run
from megatron_r1.sft.eval_loss import EvalLoss
from megatron_r1.sft.step import supervised_step
from megatron_r1.sft.supervised import SupervisedReader
from megatron_r1.sft.teacher_setup import distilling_reader, find_sft_teacher
from megatron_r1.train.hooks.eval import EvalHook
from megatron_r1.train.loop import train
from megatron_r1.train.rewinds import skipped_sequences, skipping

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
    """Fine-tune a model, or resume its run."""
    check(config)
    initial, tokenizer = initial_model(config)
    # Inference must format prompts as training does, and end responses where it does.
    as_trained = inference_tokenizer(config.sft, tokenizer)
    teacher = find_sft_teacher(config, tokenizer)
    length = config.train.sequence_length
    examples = open_examples(config.sft, config.data, tokenizer, length, config.seed, run_folder(config))
    training, validation = batches_of(config, examples, tokenizer.pad)
    config = with_epoch_steps(config, training.total)
    trains_mtp = config.model.mtp.loss_coefficient > 0
    with training_run(config, as_trained, initial, trained_weights(config, trains_mtp)) as run:
        if run.platform.transformer_engine:
            check_fp8_sequences(config)
        begin_post_training(run, trains_mtp)
        reader = reader_of(run)
        training_reader = distilling_reader(run, teacher) if teacher else reader
        first = []
        if validation.total:
            measure = EvalLoss(run, reader, validation)
            with phase("evaluation"):
                before = {} if run.state.step else {"eval/loss_before": measure.loss()}
            first.append(EvalHook(measure, config.sft.eval_interval, config.train.steps, before))
        if dist.get_rank() == 0:
            logger.info("conversations: %s", ", ".join(f"{name} {count}" for name, count in examples.counts.items()))
        hooks = run.hooks(SHOWN, "sft", first=first)
        training.go_on_for(skipped_sequences(run.rewinds))
        step = skipping(supervised_step(run, training_reader, training), run.rewinds)
        state = train(run.state, step, hooks, config.train.steps)
        finish_run(run, state)


def check(config: RunConfig) -> None:
    """Check the config for this verb.

    Raises:
        ConfigError: there is no dataset, or a key contradicts the packing of examples.
    """
    if config.sft.source == "files" and not config.sft.datasets:
        raise ConfigError("sft.datasets", "{}", "must name a source: sft.datasets.NAME.path=FILE")
    ramp = config.train.schedule.batch_ramp
    if ramp.tokens:
        raise ConfigError("train.schedule.batch_ramp.tokens", ramp.tokens, "must be 0 in sft, where epochs are counted")
    if config.sft.packing != "none" and config.parallel.context > 1:
        raise ConfigError("sft.packing", config.sft.packing, "must be none where parallel.context is above 1")


def batches_of(config: RunConfig, examples: Examples, pad: int) -> tuple[ChatBatches, ChatBatches]:
    """Training batches and validation batches."""
    settings, length = config.sft, config.train.sequence_length
    packed = settings.packing == "best_fit"
    training = ChatBatches(examples, ~examples.eval_N, length, packed, settings.epochs, pad, config.seed)
    return training, ChatBatches(examples, examples.eval_N, length, packed, 1, pad, config.seed)


def with_epoch_steps(config: RunConfig, sequences: int) -> RunConfig:
    """The config with the steps that its epochs take, or train.steps where that is fewer."""
    return limit_steps(config, -(-sequences // config.train.global_batch_size))


def reader_of(run: TrainingRun) -> SupervisedReader:
    """The reader of the run's batches."""
    config = run.config
    packed, degrees = config.sft.packing == "best_fit", config.parallel
    # Interleaved pipeline stages need micro-batches of one length.
    trimmed_to = 0 if packed or degrees.virtual_pipeline > 1 else token_multiple(run.model) * 2 * degrees.context
    return SupervisedReader(packed, config.model.mtp.num_layers, run.platform.device, trimmed_to)
