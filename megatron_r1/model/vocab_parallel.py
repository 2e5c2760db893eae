"""Log-probabilities, entropy and divergence of tokens from their hidden states, without the logits of all tokens.

The head's rows are shared out over tensor-parallel ranks. Tokens go through it in chunks, forward and once more
backward, so that of [T, V] logits only a chunk's exist at any time; ranks exchange a few numbers per token. One
function serves supervised training, distillation, reinforcement learning and perplexity.

Shapes: T tokens, D width, V this rank's rows of the head, K targets of a token, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits of a chunk on this rank by default: 64 MiB in fp32, and all that a small vocabulary needs in one go."""
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


class TopWords(NamedTuple):
    """A model's most likely words, the most likely first, alike on all tensor-parallel ranks."""

    ids: Tensor
    """int64 [*tokens, K]."""
    log_probs: Tensor
    """In nats, fp32 (float64 for float64 models): [*tokens, K]."""


@dataclass(frozen=True)
class Head:
    """An output layer whose rows tensor-parallel ranks share out in order, each as many."""

    weight_VD: Tensor
    group: dist.ProcessGroup
    words: int | None = None
    """Rows of the vocabulary over all ranks; what the head holds beyond is padding and gets no probability. None is
    all of them."""

    @property
    def first_row(self) -> int:
        return dist.get_rank(self.group) * self.weight_VD.shape[0]

    @property
    def rows(self) -> int:
        """This rank's rows that are words."""
        held = self.weight_VD.shape[0]
        return held if self.words is None else min(max(self.words - self.first_row, 0), held)

    @property
    def vocabulary(self) -> int:
        """Words over all ranks."""
        return self.weight_VD.shape[0] * dist.get_world_size(self.group) if self.words is None else self.words


class Other(NamedTuple):
    """Another model, to which the divergence is taken; nothing flows back into it."""

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
    other: Other | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenScores:
    """Scores of targets under softmax(hidden head^T / temperature); all of them have gradients.

    The gradient of `hidden` is this rank's part, to be summed over `head.group`, as megatron-core's own regions do
    (`megatron_r1.model.scores` puts them around it). Backward computes the logits again: 4 products where keeping them
    takes 3. Collective over `head.group`.

    Args:
        hidden: [*tokens, D], the same tokens on every rank of the group.
        targets: [*tokens] or [*tokens, K] int64, ids of words.
        temperature: logits are divided by it; above 0.
        other: another model, for the divergence; its probabilities are at the same temperature.
        chunk_logits: logits of this rank that may exist at once, at least one token's. Two such buffers live at a
            time, four with `other`.
    Raises:
        ValueError: shapes or settings do not fit.
    """
    single = targets.dim() == hidden.dim() - 1
    if targets.shape[: hidden.dim() - 1] != hidden.shape[:-1] or not (single or targets.dim() == hidden.dim()):
        raise ValueError(f"targets: have shape {tuple(targets.shape)}, hidden states {tuple(hidden.shape)}")
    plan = _planned(head, temperature, chunk_logits)
    tokens = hidden.shape[:-1]
    targets_TK = targets.reshape(-1, 1) if single else targets.flatten(0, -2)
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    other_TD, other_VD = (other.hidden_TD.flatten(0, -2).detach(), other.weight_VD.detach()) if other else (None, None)
    scores = _Scores.apply(hidden_TD, head.weight_VD, targets_TK, other_TD, other_VD, plan)
    log_probs_TK, entropy_T, *divergence_T = scores
    return TokenScores(
        log_probs_TK.view(targets.shape),
        entropy_T.view(tokens),
        divergence_T[0].view(tokens) if divergence_T else None,
    )


@torch.no_grad()
def top_words(
    hidden: Tensor, head: Head, k: int, *, temperature: float = 1.0, chunk_logits: int = CHUNK_LOGITS
) -> TopWords:
    """The K most likely words under softmax(hidden head^T / temperature), without gradient.

    Of equally likely words the one with the lower id comes first, so that every layout finds the same. Ranks exchange
    only their own K best. Collective over `head.group`.

    Args:
        hidden: [*tokens, D], the same tokens on every rank of the group.
        k: words of a token, at most the vocabulary.
        temperature: logits are divided by it; above 0.
        chunk_logits: logits of this rank that may exist at once, at least one token's.
    Raises:
        ValueError: settings do not fit.
    """
    plan = _planned(head, temperature, chunk_logits)
    if not 0 < k <= head.vocabulary:
        raise ValueError(f"k={k}: must be at least 1 and at most the {head.vocabulary} words of the vocabulary")
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    # One chunk at the least, so that no tokens at all need no code of their own: every rank alike.
    chunks = list(plan.chunks(len(hidden_TD))) or [slice(0, 0)]
    parts = [_top_of_chunk(plan, plan.logits(hidden_TD[chunk], head.weight_VD), k) for chunk in chunks]
    return TopWords(*(torch.cat(part).view(*hidden.shape[:-1], k) for part in zip(*parts, strict=True)))


def _planned(head: Head, temperature: float, chunk_logits: int) -> _Plan:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if head.words is not None and not 0 < head.words <= head.weight_VD.shape[0] * dist.get_world_size(head.group):
        raise ValueError(f"words={head.words}: must be at least 1 and at most the rows of the head")
    return _Plan(head, temperature, max(1, chunk_logits // max(1, head.weight_VD.shape[0])))


class _Plan(NamedTuple):
    head: Head
    temperature: float
    chunk_tokens: int

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))

    def logits(self, hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
        """Of the words that this rank holds, in a buffer of its own."""
        logits_CV = hidden_CD @ weight_VD[: self.head.rows].t()
        if logits_CV.dtype != torch.float64:
            logits_CV = logits_CV.float()
        return logits_CV if self.temperature == 1.0 else logits_CV.div_(self.temperature)

    def reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        dist.all_reduce(values, operation, self.head.group)
        return values

    def gather(self, values_CK: Tensor) -> Tensor:
        """Every rank's, in the order of ranks: [C, ranks x K]."""
        parts = [torch.empty_like(values_CK) for _ in range(dist.get_world_size(self.head.group))]
        dist.all_gather(parts, values_CK.contiguous(), self.head.group)
        return torch.cat(parts, 1)

    def mine(self, targets_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets this rank holds, and at which of its rows; row 0 for those of other ranks."""
        local_CK = targets_CK - self.head.first_row
        mine_CK = (local_CK >= 0) & (local_CK < self.head.rows)
        return local_CK.where(mine_CK, 0), mine_CK


def _peak(logits_CV: Tensor) -> Tensor:
    if logits_CV.shape[1]:
        return logits_CV.amax(-1)
    return logits_CV.new_full(logits_CV.shape[:1], -torch.inf)


def _top_of_chunk(plan: _Plan, logits_CV: Tensor, k: int) -> TopWords:
    """Of one chunk, [C, K] each; the buffer is used up."""
    values_CK, places_CK = _greatest(logits_CV, min(k, logits_CV.shape[1]))
    lacking = (0, k - values_CK.shape[1])
    # What a rank lacks is less likely than any word of another one.
    values_CX = plan.gather(torch.nn.functional.pad(values_CK, lacking, value=-torch.inf))
    ids_CX = plan.gather(torch.nn.functional.pad(places_CK + plan.head.first_row, lacking))
    # Ranks hold the words in order: a sort that keeps equals as they are keeps the lower id first.
    values_CK, order_CK = (x_CX[:, :k] for x_CX in values_CX.sort(dim=-1, descending=True, stable=True))
    peak_C1 = values_CK[:, :1]
    total_C = plan.reduce(logits_CV.sub_(peak_C1).exp_().sum(-1))
    return TopWords(ids_CX.gather(-1, order_CK), values_CK - peak_C1 - total_C.log()[:, None])


def _greatest(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest logits of each token and their places, [C, k]: the greatest first, of equals the lower place."""
    values_Ck, places_Ck = logits_CV.topk(k)
    if k:
        # Where equals lie on both sides of the cut, topk takes whichever it likes.
        least_C1 = values_Ck[:, -1:]
        split_C = (logits_CV == least_C1).sum(-1) > (values_Ck == least_C1).sum(-1)
        if split_C.any():
            places_Ck[split_C] = logits_CV[split_C].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    places_Ck = places_Ck.sort(-1).values
    values_Ck, order_Ck = logits_CV.gather(-1, places_Ck).sort(dim=-1, descending=True, stable=True)
    return values_Ck, places_Ck.gather(-1, order_Ck)


class _Scores(torch.autograd.Function):
    """Per token: log-probabilities of the targets, the entropy, and the divergence where there is another model."""

    @staticmethod
    def forward(
        context: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_TK: Tensor,
        other_TD: Tensor | None,
        other_VD: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        parts = []
        for chunk in plan.chunks(len(hidden_TD)):
            # No name here holds a buffer while the next chunk's are made.
            parts.append(
                _forward_chunk(
                    plan,
                    plan.logits(hidden_TD[chunk], weight_VD),
                    targets_TK[chunk],
                    None if other_TD is None or other_VD is None else plan.logits(other_TD[chunk], other_VD),
                )
            )
        if not parts:  # no tokens: every rank alike
            empty = hidden_TD.new_zeros(0, dtype=torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32)
            parts = [(empty.view(0, targets_TK.shape[1]), *[empty] * (3 if other_TD is None else 6))]
        log_probs_TK, entropy_T, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
        # Kept per token: the peak and the sum for each model, so that backward asks no other rank.
        context.plan = plan
        context.save_for_backward(hidden_TD, weight_VD, targets_TK, other_TD, other_VD, entropy_T, *rest)
        context.set_materialize_grads(False)
        return log_probs_TK, entropy_T, *rest[4:]

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_TK, other_TD, other_VD, entropy_T, *rest = context.saved_tensors
        plan: _Plan = context.plan
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
                    None if len(gradients) < 3 or gradients[2] is None else plan.logits(other_TD[chunk], other_VD),
                    [entropy_T[chunk], *(values_T[chunk] for values_T in rest)],
                    [None if gradient is None else gradient[chunk] for gradient in gradients],
                ).to(hidden_TD.dtype),
                (hidden_TD[chunk], weight_VD),
                (None if hidden_gradient_TD is None else hidden_gradient_TD[chunk], sum_VD),
            )
        return hidden_gradient_TD, None if sum_VD is None else sum_VD.to(weight_VD.dtype), None, None, None, None


def _forward_chunk(plan: _Plan, logits_CV: Tensor, targets_CK: Tensor, other_CV: Tensor | None) -> tuple[Tensor, ...]:
    """Log-probs [C, K], entropy, peak and sum of exponentials; then, with another model, its two and the divergence.

    Both buffers are used up.
    """
    models = [logits_CV] if other_CV is None else [logits_CV, other_CV]
    peaks = plan.reduce(torch.stack([_peak(x_CV) for x_CV in models]), dist.ReduceOp.MAX)
    shifted_CV = logits_CV.sub_(peaks[0][:, None])
    exp_CV = shifted_CV.exp()
    local_CK, mine_CK = plan.mine(targets_CK)
    if plan.head.rows:
        chosen_CK = shifted_CV.gather(-1, local_CK).where(mine_CK, 0.0)
    else:
        chosen_CK = torch.zeros_like(targets_CK, dtype=shifted_CV.dtype)
    totals = [exp_CV.sum(-1)]
    if other_CV is not None:
        other_CV.sub_(peaks[1][:, None])
        totals.append(other_CV.exp().sum(-1))
        weighted_C = (exp_CV * shifted_CV).sum(-1)
    else:
        weighted_C = shifted_CV.mul_(exp_CV).sum(-1)
    total_C, weighted_C, *more = plan.reduce(torch.stack([totals[0], weighted_C, *chosen_CK.unbind(1), *totals[1:]]))
    log_total_C = total_C.log()
    count = targets_CK.shape[1]
    log_probs_CK = torch.stack(more[:count], dim=1) - log_total_C[:, None]
    entropy_C = log_total_C - weighted_C / total_C
    if other_CV is None:
        return log_probs_CK, entropy_C, peaks[0], total_C
    p_CV, q_CV = shifted_CV.sub_(log_total_C[:, None]), other_CV.sub_(more[count].log()[:, None])
    # q - p sums to nothing over the vocabulary, and takes with it what rounding did to the logs of the sums.
    gap_CV = p_CV - q_CV
    p_CV.exp_()
    terms_CV = gap_CV.mul_(p_CV).add_(q_CV.exp_()).sub_(p_CV)
    return log_probs_CK, entropy_C, peaks[0], total_C, peaks[1], more[count], plan.reduce(terms_CV.sum(-1))


def _backward_chunk(
    plan: _Plan,
    logits_CV: Tensor,
    targets_CK: Tensor,
    other_CV: Tensor | None,
    kept: list[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """Gradient [C, V] of the logits before the temperature.

    With g, h and d those of log-probabilities, entropy H and divergence KL: sum_k g_k (1[v = target_k] - p_v)
    - h p_v (log p_v + H) + d p_v (log p_v - log q_v - KL), over the temperature.
    """
    entropy_C, peak_C, total_C, *rest = kept
    of_targets_CK, of_entropy_C, of_divergence_C = (*gradients, None)[:3]
    shifted_CV = logits_CV.sub_(peak_C[:, None])
    probs_CV = shifted_CV.exp().div_(total_C[:, None])
    weight_CV: Tensor | None = None
    if of_entropy_C is not None or of_divergence_C is not None:
        log_probs_CV = shifted_CV.sub_(total_C.log()[:, None])
        if of_entropy_C is not None:
            above_CV = (
                log_probs_CV + entropy_C[:, None] if other_CV is not None else log_probs_CV.add_(entropy_C[:, None])
            )
            weight_CV = above_CV.mul_(-of_entropy_C[:, None])
        if other_CV is not None and of_divergence_C is not None:
            other_peak_C, other_total_C, divergence_C = rest
            gap_CV = log_probs_CV.sub_(other_CV.sub_(other_peak_C[:, None]).sub_(other_total_C.log()[:, None]))
            gap_CV.sub_(divergence_C[:, None]).mul_(of_divergence_C[:, None])
            weight_CV = gap_CV if weight_CV is None else weight_CV.add_(gap_CV)
    sum_C = None if of_targets_CK is None else of_targets_CK.sum(1)
    if weight_CV is None:
        gradient_CV = probs_CV.mul_(-sum_C[:, None]) if sum_C is not None else probs_CV.zero_()
    else:
        gradient_CV = probs_CV.mul_(weight_CV if sum_C is None else weight_CV.sub_(sum_C[:, None]))
    if of_targets_CK is not None and plan.head.rows:
        local_CK, mine_CK = plan.mine(targets_CK)
        gradient_CV.scatter_add_(-1, local_CK, of_targets_CK.where(mine_CK, 0.0))
    return gradient_CV if plan.temperature == 1.0 else gradient_CV.div_(plan.temperature)


def _backward_products(
    plan: _Plan, gradient_CV: Tensor, factors: tuple[Tensor, Tensor], into: tuple[Tensor | None, Tensor | None]
) -> None:
    """Write the chunk's gradient of its hidden states, add its part of the head's."""
    (hidden_CD, weight_VD), (hidden_gradient_CD, sum_VD) = factors, into
    if hidden_gradient_CD is not None:
        torch.mm(gradient_CV, weight_VD[: plan.head.rows], out=hidden_gradient_CD)
    if sum_VD is not None:
        _add_product(sum_VD[: plan.head.rows], gradient_CV.t(), hidden_CD)


def _add_product(sum_VD: Tensor, gradient_VC: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradient hidden; half-precision products are added up in fp32, a block of rows at a time."""
    if sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(gradient_VC, hidden_CD)
        return
    for start in range(0, len(sum_VD), GRADIENT_ROWS):
        sum_VD[start : start + GRADIENT_ROWS] += gradient_VC[start : start + GRADIENT_ROWS] @ hidden_CD
