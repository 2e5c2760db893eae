"""pretrain: next-token prediction, with multi-token prediction, on the source's text."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_r1.config.cross_checks import check_fp8_sequences
from megatron_r1.config.run import RunConfig
from megatron_r1.data.pretraining.corpus import Corpus, build_corpus
from megatron_r1.data.pretraining.packed import PackedCorpus, packed_corpus, tokenizer_folder
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.parallel.mesh import data_parallel_group
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.initial_weights import InitialModel, check_vocabulary, find_initial_model
from megatron_r1.runs.training_run import TrainingRun, finish_run, training_run
from megatron_r1.train.hooks.balance import BalanceHook
from megatron_r1.train.loop import Step, train
from megatron_r1.train.packed import PackedReader
from megatron_r1.train.rewinds import skipping
from megatron_r1.train.routing import pretraining_policy
from megatron_r1.train.schedule import batch_size, value_at
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import BatchOutcome, training_step
from megatron_r1.train.stream import StreamReader
from megatron_r1.train.update import update

SHOWN = (
    "train/loss",
    "train/mtp_loss",
    "train/gradient_norm",
    "train/learning_rate",
    "perf/tokens_per_second",
    "perf/mfu",
    "moe/load_max",
)


def run(config: RunConfig) -> None:
    """Pre-train a model, or resume its run."""
    initial = None
    if config.init.from_:
        initial = find_initial_model(config.init.from_, which=config.init.weights).serving(config.model)
    corpus, tokenizer = open_corpus(config, initial)
    with training_run(config, tokenizer, initial) as run:
        # Every rank knows the loads of all experts; rank 0, which records metrics, measures their balance.
        settings = config.train
        balance = BalanceHook(settings.balance_window, settings.log_interval, run.extra) if is_rank_zero() else None
        hooks = run.hooks(SHOWN, "pretrain", balance.tensors if balance else dict, first=[balance] if balance else [])
        step = skipping(pretraining_step(run, corpus), run.rewinds)
        state = train(run.state, step, hooks, config.train.steps)
        finish_run(run, state)


def open_corpus(config: RunConfig, initial: InitialModel | None) -> tuple[Corpus | PackedCorpus, Tokenizer]:
    """The corpus of a run, and the tokenizer of its initial model or else of the corpus.

    Raises:
        ConfigError: tokenizer, corpus and model do not fit each other.
        DataError: a dataset is unfinished or damaged.
    """
    indexed, length = config.data.indexed, config.train.sequence_length
    if config.data.source != "indexed":
        tokenizer = initial.tokenizer() if initial else train_tokenizer(config.data)
        return build_corpus(config.data, tokenizer, length, config.seed, run_folder(config) / "data"), tokenizer
    tokenizer = initial.tokenizer() if initial else Tokenizer.load(tokenizer_folder(indexed))
    check_vocabulary(config.model.vocab_size, tokenizer)
    return packed_corpus(indexed, tokenizer, length, config.seed), tokenizer


def pretraining_step(run: TrainingRun, corpus: Corpus | PackedCorpus) -> Step:
    """The step of pre-training: an update on the next batch."""
    if run.platform.transformer_engine:
        check_fp8_sequences(run.config)
    reader: Any = reader_of(run, corpus)
    config, settings = run.config, run.config.train
    group = data_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    policy = pretraining_policy(config)

    def learn(state: TrainState, rate: float) -> BatchOutcome:
        consumed, size = state.consumed_tokens, batch_size(settings, state.consumed_tokens)
        mtp_weight = value_at(config.model.mtp.loss_coefficient, settings.schedule.mtp_weight_phases, consumed)
        # megatron-core reads this weight in every forward pass.
        run.model.config.mtp_loss_scaling_factor = mtp_weight
        policy.apply(run.model, consumed)
        micro_batches = reader.micro_batches(
            corpus.batch(state.data_position, size), rank, ranks, settings.micro_batch_size
        )
        shape = settings.sequence_length, min(settings.micro_batch_size, size // ranks)
        result = update(run.model, run.optimizer, micro_batches, reader.forward, rate, *shape)
        tokens = size * settings.sequence_length
        metrics = {
            "train/batch_size": size,
            "train/mtp_weight": mtp_weight,
            "moe/bias_rate": policy.bias_rate_at(consumed),
        }
        return BatchOutcome(result=result, sequences=size, tokens=tokens, routed_tokens=tokens, metrics=metrics)

    return training_step(config, learn, run.platform.device)


def reader_of(run: TrainingRun, corpus: Corpus | PackedCorpus) -> StreamReader | PackedReader:
    """The reader of the corpus's batches.

    Raises:
        ConfigError: the platform cannot keep documents separate.
    """
    if isinstance(corpus, Corpus):
        return StreamReader(run.platform.device)
    cross = run.config.data.indexed.cross_document_attention
    if not cross and run.platform.transformer_engine:
        allowed = "must be true with Transformer Engine: there attention is causal over the whole sequence"
        raise ConfigError("data.indexed.cross_document_attention", cross, allowed)
    if not cross and run.config.parallel.context > 1:
        raise ConfigError(
            "data.indexed.cross_document_attention", cross, "must be true where parallel.context is above 1"
        )
    return PackedReader(cross, run.config.model.mtp.num_layers, run.platform.device)
