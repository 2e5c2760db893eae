"""A model's scores of tokens, by its own head but never with the logits of all tokens: see `parallel.vocabulary`.

Every stage that looks at probabilities takes them from here. Shapes: B rows, L positions, D width, V this rank's rows
of the head, K targets, N chosen positions in the order of rows.
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
from megatron_r1.model.vocab_parallel import CHUNK_LOGITS, Head, Other, TokenScores, TopWords, score_tokens, top_words
from megatron_r1.parallel.mesh import tensor_parallel_group


class Question(NamedTuple):
    """Targets of which a model is asked the probabilities."""

    targets: Tensor
    """[N] token ids, or [N, K]."""
    temperature: float = 1.0
    """Logits are divided by it."""
    words: int | None = None
    """Size of the vocabulary, where the head has rows beyond it."""


def model_scores(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    targets: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    words: int | None = None,
    other: Other | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    **more: Any,
) -> TokenScores | Tensor:
    """Scores [B, L] of each position's target, on the last pipeline stage; the stage's hidden states on others.

    Cross-entropy is minus `log_probs`; perplexity the exponential of its mean. In a training pass, multi-token
    prediction adds its own loss as ever (with the logits of all tokens), unless it is switched off; it needs
    `labels` among `more`.

    Args:
        model: the model in whatever wrapping the schedule has it.
        targets: [B, L] token ids, or [B, L, K] for scores of K words at each position: then `log_probs` has K too.
        temperature: logits are divided by it; the engine's, where its samples are scored.
        words: size of the vocabulary, where the head has rows beyond it.
        other: another model with its hidden states as [L, B, D] (`last_hidden_states`), for the divergence.
        chunk_logits: see `score_tokens`.
        more: what megatron-core's forward takes besides.
    """

    def score(hidden_LBD: Tensor, weight_VD: Tensor) -> TokenScores:
        scores = score_tokens(
            hidden_LBD,
            targets.transpose(0, 1),
            Head(weight_VD, tensor_parallel_group(), words),
            temperature=temperature,
            other=other,
            chunk_logits=chunk_logits,
        )
        divergence = None if scores.divergence is None else scores.divergence.t()
        return TokenScores(scores.log_probs.transpose(0, 1), scores.entropy.t(), divergence)

    return _read(model, inputs_BL, positions_BL, score, attention_mask=attention_mask, **more)


def chosen_scores(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    chosen_BL: Tensor,
    questions: Sequence[Question],
    *,
    chunk_logits: int = CHUNK_LOGITS,
    **more: Any,
) -> list[TokenScores] | Tensor:
    """Scores of the chosen positions alone, for each question, as `model_scores` gives them of all positions.

    Args:
        chosen_BL: which positions: bool.
        questions: each costs the head's products once more; several targets of one softmax are one question.
        more: what megatron-core's forward takes besides.
    """

    def score(hidden_LBD: Tensor, weight_VD: Tensor) -> list[TokenScores]:
        hidden_ND = hidden_LBD.transpose(0, 1)[chosen_BL]
        return [
            score_tokens(
                hidden_ND,
                question.targets,
                Head(weight_VD, tensor_parallel_group(), question.words),
                temperature=question.temperature,
                chunk_logits=chunk_logits,
            )
            for question in questions
        ]

    return _read(model, inputs_BL, positions_BL, score, **more)


def model_top_words(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    chosen_BL: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    words: int | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    **more: Any,
) -> TopWords | Tensor:
    """The model's K most likely words at each chosen position, [N, K], without gradient; see `chosen_scores`."""

    def best(hidden_LBD: Tensor, weight_VD: Tensor) -> TopWords:
        head = Head(weight_VD, tensor_parallel_group(), words)
        hidden_ND = hidden_LBD.transpose(0, 1)[chosen_BL]
        return top_words(hidden_ND, head, k, temperature=temperature, chunk_logits=chunk_logits)

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
    if last.share_embeddings_and_output_weights:
        return last.shared_embedding_or_output_weight()
    return last.output_layer.weight


def _read(
    model: Any,
    inputs_BL: Tensor,
    positions_BL: Tensor,
    read: Callable[[Tensor, Tensor], Any],
    *,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Any:
    """What `read` makes of the last hidden states [L, B, D] of all positions, and of this rank's rows of the head."""

    def process(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Any:
        weight_VD = output_layer.weight if output_weight is None else output_weight
        return read(_on_every_rank(hidden_states, output_layer), weight_VD)

    return model(inputs_BL, positions_BL, attention_mask, output_processor=process, **more)


def _on_every_rank(hidden: Tensor, output_layer: Any) -> Tensor:
    """Hidden states [L, B, D] of all positions; backward sums the ranks' parts, as megatron-core's head does."""
    if output_layer.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=tensor_parallel_group())
    return copy_to_tensor_model_parallel_region(hidden, group=tensor_parallel_group())
