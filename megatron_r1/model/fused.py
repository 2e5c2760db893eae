"""Layers in one node of autograd each, for a CPU, where Transformer Engine has one kernel each on a GPU.

Each saves less, copies less and starts fewer kernels than the same in torch's own functions. The gradient of a weight
is added straight to its gradient buffer where it has one, instead of being made first and then added.

Shapes: T tokens, N tokens with a copy for each of their experts, sorted by expert, K input and M output features, F
width of a gated feed-forward, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GRADIENT_BUFFER = "gradient_buffer"
"""Attribute of a weight: a tensor of its shape and type to which backward passes add its gradient."""


def weight_gradient(weight_MK: Tensor, gradient_TM: Tensor, x_TK: Tensor) -> Tensor | None:
    """The gradient of a weight that tokens were multiplied with; None where it went to the weight's buffer."""
    buffer_MK: Tensor | None = getattr(weight_MK, GRADIENT_BUFFER, None)
    if buffer_MK is None:
        return gradient_TM.t() @ x_TK
    buffer_MK.addmm_(gradient_TM.t(), x_TK)
    return None


def linear(x: Tensor, weight_MK: Tensor) -> Tensor:
    """x W' over the last dimension: [..., K] -> [..., M]."""
    product: Tensor = _Product.apply(x, weight_MK)
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight_MK: Tensor) -> Tensor:
        context.save_for_backward(x, weight_MK)
        return torch.nn.functional.linear(x, weight_MK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_MK = context.saved_tensors
        for_x, for_weight = context.needs_input_grad
        gradient_TM = gradient.reshape(-1, gradient.shape[-1])
        of_x = (gradient_TM @ weight_MK).view(x.shape) if for_x else None
        return of_x, weight_gradient(weight_MK, gradient_TM, x.reshape(-1, x.shape[-1])) if for_weight else None


def grouped_linear(x_NK: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """x W' where each weight [M, K] has `counts` rows of its own, in order: [N, M]."""
    product_NM: Tensor = _GroupedProduct.apply(x_NK, counts, *weights)
    return product_NM


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_NK: Tensor, counts: Sequence[int], *weights: Tensor) -> Tensor:
        context.counts = counts
        context.save_for_backward(x_NK, *weights)
        product_NM = x_NK.new_empty(x_NK.shape[0], weights[0].shape[0])
        for x_TK, product_TM, weight_MK in zip(x_NK.split(counts), product_NM.split(counts), weights, strict=True):
            torch.mm(x_TK, weight_MK.t(), out=product_TM)
        return product_NM

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_NM: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, *weights = context.saved_tensors
        for_x, _, *for_weights = context.needs_input_grad
        parts = gradient_NM.split(context.counts)
        of_x_NK = torch.empty_like(x_NK) if for_x else None
        if of_x_NK is not None:
            for gradient_TM, of_x_TK, weight_MK in zip(parts, of_x_NK.split(context.counts), weights, strict=True):
                torch.mm(gradient_TM, weight_MK, out=of_x_TK)
        of_weights = [
            weight_gradient(weight_MK, gradient_TM, x_TK) if needs_gradient else None
            for weight_MK, gradient_TM, x_TK, needs_gradient in zip(
                weights, parts, x_NK.split(context.counts), for_weights, strict=True
            )
        ]
        return of_x_NK, None, *of_weights


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / root-mean-square(x) * weight over the last dimension, as `torch.nn.functional.rms_norm`."""
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != weight_D.dtype:
        return torch.nn.functional.rms_norm(x, list(weight_D.shape), weight_D, epsilon)
    normed: Tensor = _Normed.apply(x, weight_D, epsilon)
    return normed


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        size = x.shape[-1]
        # The reciprocal of the root-mean-square, one number a token.
        scale: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(epsilon).rsqrt_()
        context.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, scale = context.saved_tensors
        normed = x * scale
        product_TD = (gradient * normed).flatten(0, -2)
        of_weight_D = product_TD.sum(0)
        # The part of the gradient along x changes only its length, which the norm takes out again.
        along = (product_TD @ weight_D).div_(-x.shape[-1]).view(scale.shape)
        of_x = (gradient * weight_D).addcmul_(normed, along).mul_(scale)
        return of_x, of_weight_D, None


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension: [..., 2F] -> [..., F]."""
    product: Tensor = _Gated.apply(x)
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        gate, up = x.chunk(2, -1)
        of_x = torch.empty_like(x)
        of_gate, of_up = of_x.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), gradient, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return of_x


def weighted_swiglu(x_N2F: Tensor, weight_N: Tensor) -> Tensor:
    """`swiglu`, each token's times a weight: [N, 2F] -> [N, F]."""
    product_NF: Tensor = _WeightedGated.apply(x_N2F, weight_N)
    return product_NF


class _WeightedGated(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_N2F: Tensor, weight_N: Tensor) -> Tensor:
        context.save_for_backward(x_N2F, weight_N)
        gate, up = x_N2F.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up).mul_(weight_N[:, None])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_NF: Tensor) -> tuple[Tensor, Tensor]:
        x_N2F, weight_N = context.saved_tensors
        gate, up = x_N2F.chunk(2, -1)
        of_x = torch.empty_like(x_N2F)
        of_gate, of_up = of_x.chunk(2, -1)
        active = torch.nn.functional.silu(gate)
        weighted = (gradient_NF * weight_N[:, None]).to(x_N2F.dtype)
        torch.mul(active, weighted, out=of_up)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=of_gate)
        return of_x, active.mul_(up).mul_(gradient_NF).sum(-1, dtype=weight_N.dtype)


class Copies:
    """The copies of tokens that go to experts, sorted by expert and within an expert by token.

    Attributes:
        counts_E: copies of each expert; `counts` as numbers.
        token_N: token of each copy.
        expert_N: expert of each copy.
        copies_N: the copies of the first token, then of the second, and so on.
        starts_T: where in `copies_N` those of each token start.
    """

    def __init__(self, routing_map_TE: Tensor):
        """
        Args:
            routing_map_TE: true where a token goes to an expert.
        """
        map_ET = routing_map_TE.t()
        self.counts_E = map_ET.sum(1)
        self.counts: list[int] = self.counts_E.tolist()
        self.expert_N, self.token_N = map_ET.nonzero(as_tuple=True)
        number_ET = map_ET.flatten().cumsum(0).view(map_ET.shape)
        self.copies_N = number_ET.t()[routing_map_TE].sub_(1)
        experts_T = routing_map_TE.sum(1)
        self.starts_T = experts_T.cumsum(0) - experts_T

    def gather(self, x_TD: Tensor) -> Tensor:
        """Each copy's token: [N, D]."""
        x_ND: Tensor = _Gather.apply(x_TD, self)
        return x_ND

    def sum(self, x_ND: Tensor) -> Tensor:
        """For each token the sum of its copies: [T, D]."""
        x_TD: Tensor = _Sum.apply(x_ND, self)
        return x_TD


def _summed(x_ND: Tensor, copies: Copies) -> Tensor:
    return torch.embedding_bag(x_ND.contiguous(), copies.copies_N, copies.starts_T)[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_TD: Tensor, copies: Copies) -> Tensor:
        context.copies = copies
        return x_TD.index_select(0, copies.token_N)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_ND: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient_ND, context.copies), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_ND: Tensor, copies: Copies) -> Tensor:
        context.copies = copies
        return _summed(x_ND, copies)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_TD: Tensor) -> tuple[Tensor, None]:
        return gradient_TD.index_select(0, context.copies.token_N), None


class LatentProjections(NamedTuple):
    """What latent attention projects of its input, for each position."""

    query_LBHD: Tensor
    """Content, then rotary part."""
    key_value_LBHD: Tensor
    """The key's content, then the value."""
    rotary_key_LBR: Tensor
    """The key's rotary part, of all heads."""


def rotated_heads(projections: LatentProjections, cos_LR: Tensor, sin_LR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [L, B, H, D] of latent attention, their rotary parts turned; values as wide as queries.

    Values that are narrower end in zeros.

    Args:
        cos_LR, sin_LR: of each position's angles, one for each pair of neighbours in the rotary part.
    """
    heads: tuple[Tensor, Tensor, Tensor] = _RotatedHeads.apply(*projections, cos_LR, sin_LR)
    return heads


class _RotatedHeads(torch.autograd.Function):
    """Pairs of neighbours turn, and all first ones come to stand before all second ones."""

    @staticmethod
    def forward(
        context: Any, query: Tensor, key_value: Tensor, rotary_key_LBR: Tensor, cos_LR: Tensor, sin_LR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        turn = cos_LR[:, None, None], sin_LR[:, None, None]
        context.save_for_backward(*turn)
        rotary = rotary_key_LBR.shape[-1]
        content = query.shape[-1] - rotary
        context.content, context.value = content, key_value.shape[-1] - content
        turned_query, key = (torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(2))
        value = query.new_empty(*query.shape[:-1], max(query.shape[-1], context.value))
        turned_query[..., :content] = query[..., :content]
        _turn(query[..., content:], *turn, turned_query[..., content:])
        key[..., :content] = key_value[..., :content]
        turned_key = torch.empty_like(rotary_key_LBR, memory_format=torch.contiguous_format)[:, :, None]
        _turn(rotary_key_LBR[:, :, None], *turn, turned_key)
        key[..., content:] = turned_key
        value[..., : context.value] = key_value[..., content:]
        value[..., context.value :] = 0
        return turned_query, key, value

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, of_query: Tensor, of_key: Tensor, of_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (cos, sin), content, value = context.saved_tensors, context.content, context.value
        query = torch.empty_like(of_query, memory_format=torch.contiguous_format)
        query[..., :content] = of_query[..., :content]
        _turn_back(of_query[..., content:], cos, sin, query[..., content:])
        key_value = of_query.new_empty(*of_query.shape[:-1], content + value)
        key_value[..., :content] = of_key[..., :content]
        key_value[..., content:] = of_value[..., :value]
        of_turned_key = of_key[..., content:].sum(2, keepdim=True)
        rotary_key = torch.empty_like(of_turned_key)
        _turn_back(of_turned_key, cos, sin, rotary_key)
        return query, key_value, rotary_key[:, :, 0], None, None


def _turn(pairs: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    first, second = pairs[..., 0::2], pairs[..., 1::2]
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)


def _turn_back(turned: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    first, second = turned.chunk(2, -1)
    torch.mul(first, cos, out=out[..., 0::2]).addcmul_(second, sin)
    torch.mul(second, cos, out=out[..., 1::2]).addcmul_(first, sin, value=-1)


BLOCK_LOGITS = 2**18
"""Logits that cross-entropy works on at a time: a core's cache holds them, 1 MiB in fp32."""


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each token, [T]; it and its gradient are computed in the logits' memory."""
    loss_T: Tensor = _CrossEntropy.apply(logits_TV, targets_T)
    return loss_T


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        rows = max(1, BLOCK_LOGITS // logits_TV.shape[1])
        total_T1 = logits_TV.new_empty(len(logits_TV), 1)
        chosen_T1 = torch.empty_like(total_T1)
        targets_T1 = targets_T[:, None]
        for block_CV, total_C1, chosen_C1, targets_C1 in zip(
            *(tensor.split(rows) for tensor in (logits_TV, total_T1, chosen_T1, targets_T1)), strict=True
        ):
            block_CV.sub_(block_CV.amax(-1, keepdim=True))
            torch.gather(block_CV, 1, targets_C1, out=chosen_C1)
            torch.sum(block_CV.exp_(), -1, keepdim=True, out=total_C1)
        # From here on the logits are exponentials.
        context.save_for_backward(logits_TV, total_T1, targets_T1)
        return (total_T1.log() - chosen_T1)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_T: Tensor) -> tuple[Tensor, None]:
        exp_TV, total_T1, targets_T1 = context.saved_tensors
        gradient_T1 = gradient_T[:, None]
        exp_TV.mul_(gradient_T1 / total_T1)
        return exp_TV.scatter_add_(1, targets_T1, -gradient_T1), None
