"""Transformer Engine's kernels of blockwise FP8 in torch: quantised tensors, their operands, and what products refuse.

A tensor is kept as rows, or as rows of its transpose ("columnwise"), or both; a scale is of 128 numbers of a row, or,
for weights, of 128 x 128 numbers. Scales of 1 x 128 lie transposed, and all are padded as the kernels pad them. Shapes:
M rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, LARGEST = 128, 448.0
FP8FwdTensors = IntEnum(
    "FP8FwdTensors", [f"GEMM{n}_{x}" for n in "123" for x in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = IntEnum("FP8BwdTensors", [f"GRAD_{x}{n}" for n in "123" for x in ("OUTPUT", "INPUT")], start=0)
"""Which of a module's quantisers is whose."""


def create_empty_quantized_tensor(
    quantizer: Any, shape: Iterable[int], dtype: torch.dtype, device: Any = None, pin_memory: bool = False
) -> Any:
    """What the quantizer's own Python says that such a tensor consists of."""
    shape = tuple(shape)
    buffers, made = quantizer.alloc_tensors(shape, device="cpu"), quantizer.storage_metadata(dtype)
    arguments = {
        f"{direction}_{part}": buffers.get(f"_{direction}_{part}")
        for direction in ("rowwise", "columnwise")
        for part in ("data", "scale_inv")
    }
    if not quantizer.internal:
        arguments |= {"shape": shape, "dtype": dtype, "device": "cpu"}
    return made["cls"](**arguments, **made["nontensor_kwargs"])


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype)
    x_MK = tensor.reshape(-1, tensor.shape[-1]).float()
    if not x_MK.numel():
        return output
    for matrix, data, scale_inv in (
        (x_MK, output._rowwise_data, output._rowwise_scale_inv),
        (x_MK.t(), output._columnwise_data, output._columnwise_scale_inv),
    ):
        if data is not None:
            _fill(matrix, data, scale_inv, quantizer)
    return output


def _fill(x_MK: Tensor, data: Tensor, scale_inv: Tensor, quantizer: Any) -> None:
    (m, k), rows = x_MK.shape, BLOCK if quantizer.block_scaling_dim == 2 else 1
    tiles = F.pad(x_MK, (0, -k % BLOCK, 0, -m % rows)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, rows))
    largest = tiles.abs().amax((1, 3))
    scale = torch.where(largest > 0, LARGEST / largest, 1.0)
    if quantizer.force_pow_2_scales:
        scale = torch.ldexp(torch.tensor(0.5), torch.frexp(scale).exponent)  # its bits without the mantissa
    numbers = (tiles * scale[:, None, :, None]).clamp(-LARGEST, LARGEST).flatten(0, 1).flatten(1)[:m, :k]
    data.view(m, k).copy_(numbers.to(torch.float8_e4m3fn).view(torch.uint8))
    inverse = 1 / scale
    if rows == 1:
        inverse = inverse.t()
    scale_inv.zero_()
    scale_inv[: inverse.shape[0], : inverse.shape[1]] = inverse


def split_quantize(
    tensor: Tensor, split_sizes: Sequence[int], quantizers: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    parts = tensor.view(-1, tensor.shape[-1]).split([int(size) for size in split_sizes])
    return [quantize(part, quantizer) for part, quantizer in zip(parts, quantizers, strict=True)]


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def fused_multi_row_padding(
    input: Tensor, output: Tensor, input_rows: Sequence[int], padded_rows: Sequence[int]
) -> None:
    """Rows of each expert, then zeros up to its padded number."""
    for source, target in zip(input.split(list(input_rows)), output.split(list(padded_rows)), strict=True):
        target.zero_()
        target[: len(source)] = source


def fused_multi_row_unpadding(
    input: Tensor, output: Tensor, input_rows: Sequence[int], unpadded_rows: Sequence[int]
) -> None:
    for source, target in zip(input.split(list(input_rows)), output.split(list(unpadded_rows)), strict=True):
        target.copy_(source[: len(target)])


def operand(x: Any, columnwise: bool) -> Tensor:
    """The fp32 matrix [M, K] that a product reads of a tensor: of a quantised one, the numbers of one direction.

    Raises:
        ValueError: cuBLAS multiplies no FP8 numbers of such a shape (cublaslt_gemm.cu, CanonicalizeGemmInput): those
            that a product sums over must be a multiple of 16, the others of 8.
    """
    if isinstance(x, Tensor) and not hasattr(x, "_rowwise_data"):
        return x.reshape(-1, x.shape[-1]).float()
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    read, other = ("columnwise", "rowwise") if columnwise else ("rowwise", "columnwise")
    kept = {f"{read}_{part}": getattr(x, f"_{read}_{part}") for part in ("data", "scale_inv")}
    if kept[f"{read}_data"] is None:
        raise ValueError(f"a product reads what a tensor was quantised without: its {read} data")
    if not kept[f"{read}_data"].numel():
        return torch.zeros(x.size()).flatten(0, -2)
    kept |= {f"{other}_{part}": None for part in ("data", "scale_inv")}
    one = Float8BlockwiseQTensorStorage(
        **kept, fp8_dtype=x._fp8_dtype, quantizer=x._quantizer, is_2D_scaled=x._is_2D_scaled
    )
    matrix = one.dequantize(dtype=torch.float32).flatten(0, -2)
    summed, outer = matrix.shape if columnwise else matrix.shape[::-1]
    if summed % 16 or outer % 8:
        raise ValueError(f"FP8 product over {summed} numbers of a matrix {tuple(matrix.shape)}: caller must pad")
    return matrix


_join = torch.distributed._coalescing_manager


@contextmanager
def together(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
    """In place of torch's manager that joins collectives into one, which gloo has not on a device: Transformer Engine
    asks for one there, and they run one after the other. Gradient buffers name no device, and must be waited for."""
    if device is None:
        with _join(group, device, async_ops) as joined:
            yield joined
    else:
        yield SimpleNamespace(wait=lambda: None)


OF_THE_EXTENSION = (
    *("create_empty_quantized_tensor", "quantize", "split_quantize", "fp8_transpose", "swap_first_dims"),
    *("fused_multi_row_padding", "fused_multi_row_unpadding", "FP8FwdTensors", "FP8BwdTensors"),
)
