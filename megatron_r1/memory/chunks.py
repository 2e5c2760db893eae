"""What each pipeline rank holds of the model, and how many micro-batches it has in flight."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.memory.parameters import Parameters, embedding, is_sparse, layer, mtp_layer


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

    def parameters(self, model: ModelConfig) -> Parameters:
        """Those of its layers, of the final norm, and of the output head where it is not the embedding."""
        found = layer(model, sparse=False) * self.dense + layer(model, sparse=True) * self.sparse
        found += mtp_layer(model) * self.mtp
        if self.loss:
            found += Parameters(whole=model.hidden_size)
        return found + (embedding(model) if self.loss and not model.tied_embeddings else Parameters())


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
    found = sum((chunk.parameters(model) for chunk in chunks), Parameters())
    return found + (embedding(model) if needs_embedding(chunks, model.tied_embeddings) else Parameters())


def needs_embedding(chunks: list[PipelineChunk], tied: bool) -> bool:
    """Whether a pipeline rank holds the embedding; `tied` says that the output head is the embedding."""
    return any(chunk.embedding or chunk.mtp or (chunk.loss and tied) for chunk in chunks)


def passes_in_flight(rank: int, chunk: int, parallel: ParallelConfig, micro_batches: int, group: int = 0) -> int:
    """Most micro-batches whose activations a chunk of a pipeline rank keeps at a time.

    One forward and one backward pass in turn after a warm-up, as megatron-core schedules: without interleaving the
    warm-up has one pass for each later rank. With it, 2 passes for each later rank, and `group` for each chunk but one;
    they are of the first chunk's first `group` micro-batches, of the second's, and so on.

    Args:
        rank: pipeline rank.
        chunk: number of the chunk on its rank.
        micro_batches: of an optimizer step.
        group: micro-batches that a chunk passes before its rank turns to the next; 0 is `pipeline`.
    """
    stages, depth = parallel.virtual_pipeline, parallel.pipeline
    if stages == 1:
        return min(depth - rank, micro_batches)
    group = group or depth
    warm_up = min(2 * (depth - rank - 1) + (stages - 1) * group, micro_batches * stages) + 1
    turns, rest = divmod(warm_up, group * stages)
    return min(turns * group + min(max(rest - chunk * group, 0), group), micro_batches)
