"""Weights in the release's FP8: E4M3 numbers, and beside them one fp32 multiplier for each block of 128 x 128.

A weight `X.weight` [M, N] goes with `X.weight_scale_inv` [ceil(M / 128), ceil(N / 128)]: despite the name, what a block
is multiplied by to get it back. The arithmetic is that of FP8 training (model/fp8/quantise.py).

Converting again changes nothing. A scale is s = fl(a / 448), a the block's largest magnitude, which becomes 448. Given
back in fp32 it is fl(448 s), and dividing that by 448 gives s again: it could only miss where 7 times s's significand
lies halfway between two fp32 numbers, which no quotient fl(a / 448) does. In bf16 it is a itself, if a was a bf16
number. Other elements move by at most a rounding of fp32 or bf16, far below half a step of E4M3, and so come back too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1.model.fp8.quantise import BLOCK, Quantised, dequantise, scales_of, tiled, untiled

SCALE_SUFFIX = "_scale_inv"
FP8 = torch.float8_e4m3fn
_SLAB, _SLAB_OF_A_GPU = 1 << 18, 1 << 26
"""Elements that one operation quantises. On a CPU intermediate results stay in a core's cache, which is five times as
fast; on a GPU each slab costs a wait for the device, and 2^26 are a quarter of a gigabyte of fp32."""
_BITS = {2: torch.int16, 4: torch.int32}


class StoredTensor(NamedTuple):
    """A tensor as a Hugging Face folder holds it."""

    weight: Tensor
    scale_inv: Tensor | None = None
    """fp32, one a block; only beside an FP8 weight."""

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for, computed in fp32 and only then cast."""
        return self.weight.to(dtype) if self.scale_inv is None else dequantise_blocks(self, dtype)

    def with_rows(self, rows: int) -> StoredTensor:
        """With rows of zeros at the end, or without the last ones; for what is not quantised."""
        if rows == len(self.weight):
            return self
        assert self.scale_inv is None
        more = self.weight.new_zeros(max(0, rows - len(self.weight)), *self.weight.shape[1:])
        return StoredTensor(torch.cat([self.weight[:rows], more]))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight; blocks at the edges are partial."""
    return tuple(-(-size // block) for size, block in zip(shape, BLOCK, strict=True))


def quantise_blocks(weight_MN: Tensor) -> StoredTensor:
    """A matrix in FP8.

    Raises:
        ValueError: it holds an infinity or a NaN, which E4M3 with a scale cannot tell apart.
    """
    values_MN = torch.empty(weight_MN.shape, dtype=FP8, device=weight_MN.device)
    scales_mn = torch.empty(scale_shape(tuple(weight_MN.shape)), dtype=torch.float32, device=weight_MN.device)
    work = scales_mn.new_empty(0)
    for rows, blocks in _slabs(weight_MN):
        tiles = tiled(weight_MN[rows], BLOCK)
        if not bool((largest := _largest(tiles).float()).isfinite().all()):
            raise ValueError("holds an infinity or a NaN, which FP8 has no place for")
        scales_mn[blocks] = scales = scales_of(largest)
        work = work if len(work) == len(tiles) else scales.new_empty(tiles.shape)
        torch.div(tiles, scales[:, None, :, None], out=work)
        # The cast rounds as training does, to nearest with ties to even: nothing lies far enough beyond 448 for a NaN.
        values_MN[rows] = untiled(work, weight_MN[rows])
    return StoredTensor(values_MN, scales_mn)


def _largest(tiles: Tensor) -> Tensor:
    """The largest magnitude of each tile [m, rows, n, columns], or an infinity or a NaN of it, in the tiles' type."""
    # Without their signs, numbers are in the order of their bits, and whole numbers are several times as fast.
    bits = tiles.view(_BITS[tiles.itemsize])
    return (bits & torch.iinfo(bits.dtype).max).amax(3).amax(1).view(tiles.dtype)


def dequantise_blocks(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The matrix that an FP8 weight stands for: products in fp32, then cast."""
    assert stored.scale_inv is not None
    result_MN = torch.empty(stored.weight.shape, dtype=dtype, device=stored.weight.device)
    for rows, blocks in _slabs(stored.weight):
        result_MN[rows] = dequantise(Quantised(as_fp32(stored.weight[rows]), stored.scale_inv[blocks], BLOCK))
    return result_MN


def as_fp32(values: Tensor) -> Tensor:
    """E4M3 numbers in fp32, exactly.

    Shifted by 7 bits they are fp16 numbers of a 256th, subnormal ones included: several times as fast as torch's cast,
    which goes one by one. NaN has no such neighbour and is left to that cast.
    """
    if _holds_nan(values):
        return values.float()
    bits = values.view(torch.int8).to(torch.int16)
    shifted = (bits << 7).bitwise_and_(0x3F80).bitwise_or_(bits.bitwise_and_(-0x8000))
    return shifted.view(torch.float16).float().mul_(256)


def _holds_nan(values: Tensor) -> bool:
    return bool((values.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())


def _slabs(matrix_MN: Tensor) -> Iterator[tuple[slice, slice]]:
    """Whole rows of blocks, a few at a time: as rows of the matrix, and as rows of scales."""
    rows, columns = matrix_MN.shape
    slab = _SLAB if matrix_MN.device.type == "cpu" else _SLAB_OF_A_GPU
    step = max(1, slab // (BLOCK.rows * max(columns, 1)))
    for start in range(0, -(-rows // BLOCK.rows), step):
        yield slice(start * BLOCK.rows, (start + step) * BLOCK.rows), slice(start, start + step)
