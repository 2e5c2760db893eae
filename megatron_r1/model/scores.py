"""A model's scores of tokens, by its own head but never with the logits of all tokens: see `model.vocab_parallel`.

Every stage that looks at probabilities takes them from here. Shapes: B sequences, L positions, D width, V this rank's
rows of the head, K targets, N selected positions, sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_r1.model.chunks import Model, chunks
from megatron_r1.model.lm_head import CHUNK_LOGITS, Head
from megatron_r1.model.vocab_parallel import ReferenceHidden, TokenScores, score_tokens
from megatron_r1.model.vocab_parallel_topk import TopKLogProbs, topk_logprobs
from megatron_r1.parallel.mesh import tensor_parallel_group


class LogProbQuery(NamedTuple):
    """Targets whose log-probabilities a model computes at the selected positions."""

    targets: Tensor
    """[N] token ids, or [N, K]."""
    temperature: float = 1.0
    """Logits are divided by it."""
    vocab_size: int | None = None
    """Size of the vocabulary, where the head has rows beyond it."""


def model_scores(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    targets: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    reference: ReferenceHidden | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    **more: Any,
) -> TokenScores | Tensor:
    """Scores [B, L] of each position's target, on the last pipeline stage; the stage's hidden states on others.

    Cross-entropy is minus `log_probs`; perplexity the exponential of its mean. In a training pass, multi-token
    prediction adds its own loss as ever (`model.mtp_loss`), unless it is switched off; it needs `labels` among `more`.

    Args:
        model: the model in whatever wrapping the schedule has it.
        targets: [B, L] token ids, or [B, L, K] for scores of K tokens at each position: then `log_probs` has K too.
        temperature: logits are divided by it; the engine's, where its samples are scored.
        vocab_size: size of the vocabulary, where the head has rows beyond it.
        reference: another model with its hidden states as [L, B, D] (`last_hidden_states`), for the divergence.
        chunk_logits: see `score_tokens`.
        more: what megatron-core's forward takes besides.
    """

    def score(hidden_LBD: Tensor, weight_VD: Tensor) -> TokenScores:
        scores = score_tokens(
            hidden_LBD,
            targets.transpose(0, 1),
            Head(weight_VD, tensor_parallel_group(), vocab_size),
            temperature=temperature,
            reference=reference,
            chunk_logits=chunk_logits,
        )
        divergence = None if scores.divergence is None else scores.divergence.t()
        return TokenScores(scores.log_probs.transpose(0, 1), scores.entropy.t(), divergence)

    return _read(model, inputs_BL, positions_BL, score, attention_mask=attention_mask, **more)


def selected_scores(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    selected_BL: Tensor,
    queries: Sequence[LogProbQuery],
    *,
    chunk_logits: int = CHUNK_LOGITS,
    **more: Any,
) -> list[TokenScores] | Tensor:
    """Scores of the selected positions alone, for each query, as `model_scores` gives them of all positions.

    Args:
        selected_BL: which positions: bool.
        queries: each costs the head's products once more; several targets of one softmax are one query.
        more: what megatron-core's forward takes besides.
    """

    def score(hidden_LBD: Tensor, weight_VD: Tensor) -> list[TokenScores]:
        hidden_ND = hidden_LBD.transpose(0, 1)[selected_BL]
        return [
            score_tokens(
                hidden_ND,
                query.targets,
                Head(weight_VD, tensor_parallel_group(), query.vocab_size),
                temperature=query.temperature,
                chunk_logits=chunk_logits,
            )
            for query in queries
        ]

    return _read(model, inputs_BL, positions_BL, score, **more)


def model_topk_logprobs(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    selected_BL: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    **more: Any,
) -> TopKLogProbs | Tensor:
    """The model's K most likely tokens at each selected position, [N, K], without gradient; see `selected_scores`."""

    def best(hidden_LBD: Tensor, weight_VD: Tensor) -> TopKLogProbs:
        head = Head(weight_VD, tensor_parallel_group(), vocab_size)
        hidden_ND = hidden_LBD.transpose(0, 1)[selected_BL]
        return topk_logprobs(hidden_ND, head, k, temperature=temperature, chunk_logits=chunk_logits)

    return _read(model, inputs_BL, positions_BL, best, **more)


def last_hidden_states(
    model: Any, inputs_BL: Tensor, positions_BL: Tensor, attention_mask: Tensor | None = None, **more: Any
) -> Tensor:
    """What the head reads, [B, L, D], whole on every tensor-parallel rank; other stages give their hidden states."""

    def whole(hidden_LBD: Tensor, _: Tensor) -> Tensor:
        return hidden_LBD.transpose(0, 1)

    return _read(model, inputs_BL, positions_BL, whole, attention_mask=attention_mask, **more)


def head_weight(model: Model) -> Tensor:
    """This rank's rows of the head, [V, D], of its last part, which must be on the last stage; tied or its own."""
    last = chunks(model)[-1]
    tied = last.share_embeddings_and_output_weights
    weight_VD: Tensor = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
    return weight_VD


def _read[Output](
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    read: Callable[[Tensor, Tensor], Output],
    *,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Output | Tensor:
    """What `read` computes from the last hidden states [L, B, D] of all positions and this rank's rows of the head.

    Stages before the last give their hidden states.
    """

    def process(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Output:
        weight_VD = output_layer.weight if output_weight is None else output_weight
        return read(on_every_rank(hidden_states, output_layer), weight_VD)

    output: Output | Tensor = model(inputs_BL, positions_BL, attention_mask, output_processor=process, **more)
    return output


def on_every_rank(hidden: Tensor, output_layer: Any) -> Tensor:
    """Hidden states [L, B, D] of all positions; backward sums the ranks' parts, as megatron-core's head does."""
    if output_layer.sequence_parallel:
        whole: Tensor = gather_from_sequence_parallel_region(hidden, group=tensor_parallel_group())
    else:
        whole = copy_to_tensor_model_parallel_region(hidden, group=tensor_parallel_group())
    return whole
