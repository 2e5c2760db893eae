"""Transformer Engine's kernels in torch: what its Python half calls of the compiled extension, and of Triton.

Each does the arithmetic of the kernel of its name, in fp32, and takes the same arguments; those that only steer a GPU
are ignored, those that would change the result are refused. Shapes: M, N, K of a matrix product, T tokens, E experts,
D width, B batch, H heads, L positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine import fp8

TYPES = {
    "Byte": 0, "Int32": 2, "Float32": 4, "Float16": 5, "BFloat16": 6, "Float8E4M3": 7, "Float8E5M2": 8,
    "Float4E2M1": 10,
}  # fmt: skip
"""Numbers of the extension's types."""
_TORCH_TYPES = {
    TYPES[name]: dtype
    for name, dtype in (("Float32", torch.float32), ("Float16", torch.float16), ("BFloat16", torch.bfloat16))
}


def _torch_type(number: Any, default: torch.dtype) -> torch.dtype:
    if number is None or isinstance(number, torch.dtype):
        return number or default
    return _TORCH_TYPES[int(number)]


def get_cudnn_version() -> int:
    return 92400


def get_cublasLt_version() -> int:
    """One before grouped products in one launch, for which there is no kernel here."""
    return 130200


def get_num_cublas_streams() -> int:
    return 1


def get_fused_attn_backend(*_: Any, **__: Any) -> tuple[Any, str]:
    """No fused attention: Transformer Engine then takes its attention in torch."""
    import transformer_engine_torch as extension

    return extension.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no GPU"


# Matrix products


def _product(a: Tensor, a_turned: bool, b: Tensor, b_turned: bool) -> Tensor:
    """B @ A in fp32 of the operands as matrices, each turned where that is said; in FP8, of what sums over its rows."""
    a, b = fp8.operand(a, columnwise=not a_turned), fp8.operand(b, columnwise=b_turned)
    return (b.t() if b_turned else b) @ (a.t() if a_turned else a)


@torch.no_grad()
def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, D: Tensor | None, quantizer: Any, output_type: Any,
    bias: Tensor | None, bias_type: Any, gelu: Any, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, alpha: float = 1.0,
    beta: float | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    if (
        quantizer is not None
        or gelu
        or comm_overlap is not None
        or (alpha, beta) not in ((1.0, None), (1.0, 1.0 if accumulate else 0.0))
    ):
        raise NotImplementedError("a product whose output is quantised, overlapped, scaled or passed on to GELU")
    product = _product(A, transa, B, transb)
    grad_bias = None
    if bias is not None and grad:
        grad_bias = B.reshape(-1, B.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if D is not None:
        D.add_(product.view(D.shape)) if accumulate else D.copy_(product.view(D.shape))
        return D, grad_bias, None, None
    product = product.to(_torch_type(output_type, A.dtype if isinstance(A, Tensor) else A._dtype))
    return product if transb else product.view(*B.size()[:-1], -1), grad_bias, None, None


@torch.no_grad()
def te_general_grouped_gemm(
    A: list[Tensor], transa: bool, B: list[Tensor], transb: bool, D: list[Tensor], output_type: Any,
    m_splits: list[int], bias: list[Tensor], bias_type: Any, single_output: bool, gelu_in: Any, grad: bool,
    workspaces: Any, workspace_size: int, accumulate: bool, *_: Any,
) -> list[Tensor]:  # fmt: skip
    outputs = D[0].view(-1, D[0].shape[-1]).split([int(m) for m in m_splits]) if single_output else D
    for a, b, one_bias, out in zip(A, B, bias, outputs, strict=True):
        if not out.numel():
            continue
        product = _product(a, transa, b, transb)
        if one_bias.numel() and not grad:
            product = product + one_bias.float()
        elif one_bias.numel():
            one_bias.copy_(b.float().sum(0))
        out.add_(product) if accumulate else out.copy_(product)
    return bias


# Root-mean-square norm


@torch.no_grad()
def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Tensor | None, quantizer: Any, output_type: Any, margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    if zero_centered:
        raise NotImplementedError("a norm whose weight counts from one")
    x = input.float()
    scale = torch.rsqrt(x.square().mean(-1) + eps)
    output = (x * scale[..., None] * weight.float()).to(_torch_type(output_type, input.dtype))
    if ln_out is not None:
        output = ln_out.copy_(output)
    return output if quantizer is None else fp8.quantize(output, quantizer), None, scale


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    dz, shape = dz.float(), dz.shape
    scale = rsigma.view(*shape[:-1], 1)
    normed = x.float().view(shape) * scale
    weighed = dz * gamma.float()
    dx = scale * (weighed - normed * (weighed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz * normed).flatten(0, -2).sum(0).to(gamma.dtype)


# Attention in torch


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    padded = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for row, part in zip(padded, tensor.split(cu_seqlens.diff().tolist()), strict=True):
        row[: len(part)] = part
    return padded


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(tensor, cu_seqlens.diff().tolist(), strict=True)])


def scaled_softmax_forward(input: Tensor, scale: float) -> Tensor:
    return (input.float() * scale).softmax(-1).to(input.dtype)


def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (input.float() * scale).masked_fill(mask.bool(), -10000.0).softmax(-1).to(input.dtype)


def scaled_softmax_backward(output_grad: Tensor, softmax_results: Tensor, scale: float) -> Tensor:
    gradient, probs = output_grad.float(), softmax_results.float()
    return (scale * probs * (gradient - (gradient * probs).sum(-1, keepdim=True))).to(softmax_results.dtype)


scaled_masked_softmax_backward = scaled_softmax_backward


# The optimizer


def multi_tensor_l2norm(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> Any:
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().view(1), norms if per_tensor else None


@torch.no_grad()
def multi_tensor_scale(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for given, result in zip(*lists, strict=True):
        result.copy_(given.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, epsilon: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Lists of gradients, weights, both moments, and where weights are 16-bit, their fp32 masters."""
    if mode != 1:
        raise NotImplementedError("weight decay in the gradient")
    correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, weight, exp_avg, exp_avg_sq, *master in zip(*lists, strict=True):
        grad, exact = grad.float(), (master or [weight])[0].float()
        first = exp_avg.float() * beta1 + grad * (1 - beta1)
        second = exp_avg_sq.float() * beta2 + grad.square() * (1 - beta2)
        update = (first / correct1) / ((second / correct2).sqrt() + epsilon) + weight_decay * exact
        exact = exact - lr * update
        for kept, value in ((exp_avg, first), (exp_avg_sq, second), *((one, exact) for one in (weight, *master))):
            kept.copy_(value)


# Triton's kernels, which sort tokens by expert. A map [T, 2 E + 1] gives, token by token, the rows of its copies from
# the last expert to the first, after E columns those experts, and in the last column how many they are.


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    chosen_ET = routing_map.bool().t()
    rows_TE = (chosen_ET.flatten().cumsum(0).view(num_experts, num_tokens) - 1).masked_fill(~chosen_ET, -1).t()
    rows_TE, experts_TE = rows_TE.sort(dim=1, descending=True)
    return torch.cat([rows_TE, experts_TE, chosen_ET.sum(0)[:, None]], dim=1).int()


def _copies(row_id_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and expert of every copy."""
    chosen_TE = torch.arange(num_experts) < row_id_map[:, -1:]
    rows, experts = row_id_map[:, :num_experts][chosen_TE], row_id_map[:, num_experts : 2 * num_experts][chosen_TE]
    return rows.long(), chosen_TE.nonzero()[:, 0], experts.long()


def permute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, scale: Tensor | None, pad_offsets: Tensor | None,
    num_tokens: int, num_experts: int, num_out_tokens: int, hidden_size: int, scale_hidden_dim: int,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    rows, tokens, experts = _copies(row_id_map, num_experts)
    if pad_offsets is not None or scale is not None:
        raise NotImplementedError("padding or FP8 scales while tokens are sorted")
    output = inp.new_empty(num_out_tokens, hidden_size)
    output[rows] = inp[tokens]
    if probs is None:
        return output, None, None
    permuted_probs = probs.new_empty(num_out_tokens)
    permuted_probs[rows] = probs[tokens, experts]
    output[rows[probs[tokens, experts] == 0]] = 0  # as the kernel does: such a slot is padding
    return output, None, permuted_probs


def unpermute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None, permuted_probs: Tensor | None,
    pad_offsets: Tensor | None, num_tokens: int, num_experts: int, hidden_size: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    rows, tokens, experts = _copies(row_id_map, num_experts)
    if pad_offsets is not None:
        raise NotImplementedError("padding while tokens are sorted")
    copies = inp[rows].float()
    if merging_probs is not None:
        copies = copies * merging_probs[tokens, experts, None].float()
    output = torch.zeros(num_tokens, hidden_size).index_add_(0, tokens, copies).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs_TE = permuted_probs.new_zeros(num_tokens, num_experts)
    probs_TE[tokens, experts] = permuted_probs[rows]
    return output, probs_TE


def make_chunk_sort_map(split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int) -> Tensor:
    """To which row each row goes."""
    rows_of_chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    order = torch.cat([rows_of_chunks[index] for index in sorted_indices.tolist()])
    return order.argsort().int()


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    to = row_id_map.long()
    order = to.argsort() if is_forward else to
    return inp[order], None if probs is None else probs[order]


OF_TRITON = (
    "make_row_id_map", "permute_with_mask_map", "unpermute_with_mask_map", "make_chunk_sort_map", "sort_chunks_by_map",
)  # fmt: skip
OF_THE_EXTENSION = {
    name for name, value in globals().items() if callable(value) and not name.startswith("_") and name not in OF_TRITON
} - {"Any", "Tensor"}
