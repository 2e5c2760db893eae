"""What pre-training reads: a corpus and its tokenizer, chosen by `data.source`."""

from __future__ import annotations

from megatron_r1.config.run import RunConfig
from megatron_r1.data.corpus import Corpus, build_corpus
from megatron_r1.data.packed import PackedCorpus, packed_corpus, tokenizer_folder
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.stages.session import run_folder
from megatron_r1.stages.weights import Weights


def open_corpus(config: RunConfig, weights: Weights | None) -> tuple[Corpus | PackedCorpus, Tokenizer]:
    """The corpus of a run, and the tokenizer of its initial weights or else of the corpus.

    Raises:
        ConfigError: tokenizer, corpus and model do not fit each other.
        DataError: a dataset is unfinished or damaged.
    """
    indexed, length = config.data.indexed, config.train.sequence_length
    if config.data.source != "indexed":
        tokenizer = Tokenizer.load(weights.tokenizer_folder) if weights else train_tokenizer(config.data)
        return build_corpus(config.data, tokenizer, length, config.seed, run_folder(config) / "data"), tokenizer
    tokenizer = Tokenizer.load(weights.tokenizer_folder if weights else tokenizer_folder(indexed))
    if tokenizer.vocab_size > config.model.vocab_size:
        allowed = f"must be at least {tokenizer.vocab_size}, the size of the tokenizer's vocabulary"
        raise ConfigError("model.vocab_size", config.model.vocab_size, allowed)
    return packed_corpus(indexed, tokenizer, length, config.seed), tokenizer
