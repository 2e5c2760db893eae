"""Log-probabilities, entropy and divergence of tokens from their hidden states, without the logits of all tokens.

The head's rows are divided among tensor-parallel ranks. Tokens go through it in chunks, forward and once more
backward, so that of [T, V] logits only a chunk's exist at any time; ranks exchange a few numbers per token. One
function serves supervised training, distillation, reinforcement learning and perplexity.

Shapes: T tokens, D width, V this rank's rows of the head, K targets of a token, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.model.lm_head import CHUNK_LOGITS, ChunkPlan, Head, chunk_plan

GRADIENT_ROWS = 8192
"""Rows of the head whose half-precision gradient is added to its fp32 sum at a time."""


class TokenScores(NamedTuple):
    """What a model says of tokens, in nats, fp32 (float64 for float64 models), alike on all tensor-parallel ranks."""

    log_probs: Tensor
    """log p(target): [*tokens], or [*tokens, K] where each token has K targets."""
    entropy: Tensor
    """-sum_v p_v log p_v over the whole vocabulary: [*tokens]."""
    divergence: Tensor | None
    """sum_v p_v log(p_v / q_v) to another model's q, over the whole vocabulary: [*tokens]; None without one."""


class ReferenceHidden(NamedTuple):
    """A reference model's hidden states and head: the divergence is taken to it, and no gradient flows into it."""

    hidden_TD: Tensor
    """Its hidden states at the same tokens; their width may differ from the model's own."""
    weight_VD: Tensor
    """This rank's rows of its head."""


def score_tokens(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    reference: ReferenceHidden | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenScores:
    """Scores of targets under softmax(hidden head^T / temperature); all of them have gradients.

    The gradient of `hidden` is this rank's part, to be summed over `head.group`, as megatron-core's own regions do
    (`megatron_r1.model.scores` puts them around it). Backward computes the logits again: 4 products where keeping them
    takes 3. Collective over `head.group`.

    Args:
        hidden: [*tokens, D], the same tokens on every rank of the group.
        targets: [*tokens] or [*tokens, K] int64, token ids.
        temperature: logits are divided by it; above 0.
        reference: another model, for the divergence; its probabilities are at the same temperature.
        chunk_logits: logits of this rank that may exist at once, at least one token's. Two such buffers live at a
            time, four with `reference`.
    Raises:
        ValueError: shapes or settings do not fit.
    """
    single = targets.dim() == hidden.dim() - 1
    if targets.shape[: hidden.dim() - 1] != hidden.shape[:-1] or not (single or targets.dim() == hidden.dim()):
        raise ValueError(f"targets: have shape {tuple(targets.shape)}, hidden states {tuple(hidden.shape)}")
    plan = chunk_plan(head, temperature, chunk_logits)
    tokens = hidden.shape[:-1]
    targets_TK = targets.reshape(-1, 1) if single else targets.flatten(0, -2)
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    reference_TD, reference_VD = (
        (reference.hidden_TD.flatten(0, -2).detach(), reference.weight_VD.detach()) if reference else (None, None)
    )
    scores = _Scores.apply(hidden_TD, head.weight_VD, targets_TK, reference_TD, reference_VD, plan)
    log_probs_TK, entropy_T, *divergence_T = scores
    return TokenScores(
        log_probs_TK.view(targets.shape),
        entropy_T.view(tokens),
        divergence_T[0].view(tokens) if divergence_T else None,
    )


def _peak(logits_CV: Tensor) -> Tensor:
    if logits_CV.shape[1]:
        return logits_CV.amax(-1)
    return logits_CV.new_full(logits_CV.shape[:1], -torch.inf)


class _Scores(torch.autograd.Function):
    """Per token: log-probabilities of the targets, the entropy, and the divergence where there is a reference model."""

    @staticmethod
    def forward(
        context: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_TK: Tensor,
        reference_TD: Tensor | None,
        reference_VD: Tensor | None,
        plan: ChunkPlan,
    ) -> tuple[Tensor, ...]:
        parts = []
        for chunk in plan.chunks(len(hidden_TD)):
            # No name here holds a buffer while the next chunk's are made.
            parts.append(
                _forward_chunk(
                    plan,
                    plan.logits(hidden_TD[chunk], weight_VD),
                    targets_TK[chunk],
                    None
                    if reference_TD is None or reference_VD is None
                    else plan.logits(reference_TD[chunk], reference_VD),
                )
            )
        if not parts:  # no tokens: every rank alike
            empty = hidden_TD.new_zeros(0, dtype=torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32)
            parts = [(empty.view(0, targets_TK.shape[1]), *[empty] * (3 if reference_TD is None else 6))]
        log_probs_TK, entropy_T, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
        # Saved per token: maximum and sum for each model, so that the backward pass needs no other rank.
        context.plan = plan
        context.save_for_backward(hidden_TD, weight_VD, targets_TK, reference_TD, reference_VD, entropy_T, *rest)
        context.set_materialize_grads(False)
        return log_probs_TK, entropy_T, *rest[4:]

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_TK, reference_TD, reference_VD, entropy_T, *rest = context.saved_tensors
        plan: ChunkPlan = context.plan
        for_hidden, for_weight = context.needs_input_grad[:2]
        hidden_gradient_TD = torch.empty_like(hidden_TD) if for_hidden else None
        sum_VD = None
        if for_weight:
            exact = weight_VD.dtype in (torch.float32, torch.float64)
            sum_VD = torch.zeros_like(weight_VD, dtype=weight_VD.dtype if exact else torch.float32)
        for chunk in plan.chunks(len(hidden_TD)):
            # No name here holds a buffer while the next chunk's are made.
            _backward_products(
                plan,
                _backward_chunk(
                    plan,
                    plan.logits(hidden_TD[chunk], weight_VD),
                    targets_TK[chunk],
                    None
                    if len(gradients) < 3 or gradients[2] is None
                    else plan.logits(reference_TD[chunk], reference_VD),
                    [entropy_T[chunk], *(values_T[chunk] for values_T in rest)],
                    [None if gradient is None else gradient[chunk] for gradient in gradients],
                ).to(hidden_TD.dtype),
                (hidden_TD[chunk], weight_VD),
                (None if hidden_gradient_TD is None else hidden_gradient_TD[chunk], sum_VD),
            )
        return hidden_gradient_TD, None if sum_VD is None else sum_VD.to(weight_VD.dtype), None, None, None, None


def _forward_chunk(
    plan: ChunkPlan, logits_CV: Tensor, targets_CK: Tensor, reference_CV: Tensor | None
) -> tuple[Tensor, ...]:
    """Log-probs [C, K], entropy, peak and sum of exponentials; then the reference model's peak, sum and the divergence.

    Both buffers are used up.
    """
    models = [logits_CV] if reference_CV is None else [logits_CV, reference_CV]
    peaks = plan.reduce(torch.stack([_peak(x_CV) for x_CV in models]), dist.ReduceOp.MAX)
    shifted_CV = logits_CV.sub_(peaks[0][:, None])
    exp_CV = shifted_CV.exp()
    local_CK, mine_CK = plan.mine(targets_CK)
    if plan.head.local_vocab_size:
        chosen_CK = shifted_CV.gather(-1, local_CK).where(mine_CK, 0.0)
    else:
        chosen_CK = torch.zeros_like(targets_CK, dtype=shifted_CV.dtype)
    totals = [exp_CV.sum(-1)]
    if reference_CV is not None:
        reference_CV.sub_(peaks[1][:, None])
        totals.append(reference_CV.exp().sum(-1))
        weighted_C = (exp_CV * shifted_CV).sum(-1)
    else:
        weighted_C = shifted_CV.mul_(exp_CV).sum(-1)
    total_C, weighted_C, *more = plan.reduce(torch.stack([totals[0], weighted_C, *chosen_CK.unbind(1), *totals[1:]]))
    log_total_C = total_C.log()
    count = targets_CK.shape[1]
    log_probs_CK = torch.stack(more[:count], dim=1) - log_total_C[:, None]
    entropy_C = log_total_C - weighted_C / total_C
    if reference_CV is None:
        return log_probs_CK, entropy_C, peaks[0], total_C
    p_CV, q_CV = shifted_CV.sub_(log_total_C[:, None]), reference_CV.sub_(more[count].log()[:, None])
    # q - p sums to nothing over the vocabulary, and takes with it what rounding did to the logs of the sums.
    gap_CV = p_CV - q_CV
    p_CV.exp_()
    terms_CV = gap_CV.mul_(p_CV).add_(q_CV.exp_()).sub_(p_CV)
    return log_probs_CK, entropy_C, peaks[0], total_C, peaks[1], more[count], plan.reduce(terms_CV.sum(-1))


def _backward_chunk(
    plan: ChunkPlan,
    logits_CV: Tensor,
    targets_CK: Tensor,
    reference_CV: Tensor | None,
    saved: list[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """Gradient [C, V] of the logits before the temperature.

    With g, h and d those of log-probabilities, entropy H and divergence KL: sum_k g_k (1[v = target_k] - p_v)
    - h p_v (log p_v + H) + d p_v (log p_v - log q_v - KL), over the temperature.
    """
    entropy_C, peak_C, total_C, *rest = saved
    of_targets_CK, of_entropy_C, of_divergence_C = (*gradients, None)[:3]
    shifted_CV = logits_CV.sub_(peak_C[:, None])
    probs_CV = shifted_CV.exp().div_(total_C[:, None])
    weight_CV: Tensor | None = None
    if of_entropy_C is not None or of_divergence_C is not None:
        log_probs_CV = shifted_CV.sub_(total_C.log()[:, None])
        if of_entropy_C is not None:
            above_CV = (
                log_probs_CV + entropy_C[:, None] if reference_CV is not None else log_probs_CV.add_(entropy_C[:, None])
            )
            weight_CV = above_CV.mul_(-of_entropy_C[:, None])
        if reference_CV is not None and of_divergence_C is not None:
            reference_peak_C, reference_total_C, divergence_C = rest
            gap_CV = log_probs_CV.sub_(
                reference_CV.sub_(reference_peak_C[:, None]).sub_(reference_total_C.log()[:, None])
            )
            gap_CV.sub_(divergence_C[:, None]).mul_(of_divergence_C[:, None])
            weight_CV = gap_CV if weight_CV is None else weight_CV.add_(gap_CV)
    sum_C = None if of_targets_CK is None else of_targets_CK.sum(1)
    if weight_CV is None:
        gradient_CV = probs_CV.mul_(-sum_C[:, None]) if sum_C is not None else probs_CV.zero_()
    else:
        gradient_CV = probs_CV.mul_(weight_CV if sum_C is None else weight_CV.sub_(sum_C[:, None]))
    if of_targets_CK is not None and plan.head.local_vocab_size:
        local_CK, mine_CK = plan.mine(targets_CK)
        gradient_CV.scatter_add_(-1, local_CK, of_targets_CK.where(mine_CK, 0.0))
    return gradient_CV if plan.temperature == 1.0 else gradient_CV.div_(plan.temperature)


def _backward_products(
    plan: ChunkPlan, gradient_CV: Tensor, factors: tuple[Tensor, Tensor], into: tuple[Tensor | None, Tensor | None]
) -> None:
    """Write the chunk's gradient of its hidden states, add its part of the head's."""
    (hidden_CD, weight_VD), (hidden_gradient_CD, sum_VD) = factors, into
    if hidden_gradient_CD is not None:
        torch.mm(gradient_CV, weight_VD[: plan.head.local_vocab_size], out=hidden_gradient_CD)
    if sum_VD is not None:
        _add_product(sum_VD[: plan.head.local_vocab_size], gradient_CV.t(), hidden_CD)


def _add_product(sum_VD: Tensor, gradient_VC: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradient hidden; half-precision products are added up in fp32, a block of rows at a time."""
    if sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(gradient_VC, hidden_CD)
        return
    for start in range(0, len(sum_VD), GRADIENT_ROWS):
        sum_VD[start : start + GRADIENT_ROWS] += gradient_VC[start : start + GRADIENT_ROWS] @ hidden_CD
