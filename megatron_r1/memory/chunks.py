"""What each pipeline rank holds of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.parameters import Parameters, embedding, is_sparse, layer, mtp_layer, router


@dataclass(frozen=True, slots=True)
class PipelineChunk:
    """The part of the model that one stage of a pipeline rank holds."""

    dense: int
    """Dense layers."""
    sparse: int
    """Layers with experts, without multi-token ones."""
    mtp: int
    """Multi-token layers."""
    embedding: bool
    loss: bool

    @property
    def layers(self) -> int:
        return self.dense + self.sparse + self.mtp

    def parameters(self, model: ModelConfig) -> Parameters:
        """Those of its layers, of the final norm, and of the output head where it is not the embedding."""
        found = layer(model, sparse=False) * self.dense + layer(model, sparse=True) * self.sparse
        found += mtp_layer(model) * self.mtp
        if self.loss:
            found += Parameters(whole=model.hidden_size)
        return found + (embedding(model) if self.loss and not model.tied_embeddings else Parameters())

    def frozen(self, config: RunConfig, verb: str) -> Parameters:
        """Those that a verb does not train: they have no gradients and no optimizer state."""
        found, mtp = Parameters(), self.mtp
        if verb == "pretrain":
            return found
        if verb != "sft" or not config.model.mtp.loss_coefficient:
            found, mtp = mtp_layer(config.model) * self.mtp, 0
        return found + (Parameters() if config.routing.train_weights else router(config.model) * (self.sparse + mtp))


def chunks_of_ranks(model: ModelConfig, parallel: ParallelConfig) -> list[list[PipelineChunk]]:
    """The chunks of each pipeline rank: of rank r the stages r, r + pipeline, r + 2 pipeline, ..."""
    chunks, first = [], 0
    for stage in parallel.stages_of(model.num_layers, model.mtp.num_layers):
        sparse = sum(is_sparse(model, number) for number in range(first, first + stage.layers))
        chunks.append(PipelineChunk(stage.layers - sparse, sparse, stage.mtp_layers, stage.embedding, stage.loss))
        first += stage.layers
    return [chunks[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]


def parameters_of_rank(chunks: list[PipelineChunk], model: ModelConfig) -> Parameters:
    """All that a pipeline rank holds, with its one embedding: for tokens, for multi-token layers or for a tied head."""
    alike = Counter(chunks).items()  # most chunks of a rank hold the same
    found = sum((chunk.parameters(model) * number for chunk, number in alike), Parameters())
    return found + (embedding(model) if needs_embedding(chunks, model.tied_embeddings) else Parameters())


def needs_embedding(chunks: list[PipelineChunk], tied: bool) -> bool:
    """Whether a pipeline rank holds the embedding; `tied` says that the output head is the embedding."""
    return any(chunk.embedding or chunk.mtp or (chunk.loss and tied) for chunk in chunks)


class PipelineRanks:
    """What the pipeline ranks of a layout hold, each kind of rank counted once.

    Attributes:
        chunks: of each rank.
        held: parameters of each rank.
        trained: those of them that the verb trains.
    """

    def __init__(self, config: RunConfig, verb: str):
        """
        Raises:
            ConfigError: the degrees do not divide the model.
        """
        self.chunks = chunks_of_ranks(config.model, config.parallel)
        self.held: list[Parameters] = []
        self.trained: list[Parameters] = []
        for rank, chunks in enumerate(self.chunks):
            if rank and chunks == self.chunks[rank - 1]:
                self.held.append(self.held[-1])
                self.trained.append(self.trained[-1])
                continue
            held = parameters_of_rank(chunks, config.model)
            self.held.append(held)
            alike = Counter(chunks).items()
            frozen = sum((chunk.frozen(config, verb) * number for chunk, number in alike), Parameters())
            self.trained.append(held + frozen * -1)

    def first_of_each_kind(self) -> list[int]:
        """The first of neighbours that hold the same: it keeps the activations of most micro-batches."""
        return [rank for rank, chunks in enumerate(self.chunks) if not rank or chunks != self.chunks[rank - 1]]
