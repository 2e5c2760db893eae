"""Quantisation to small floating-point formats with one scale a tile (DeepSeek-V3 report, section 3.3.2).

Pure functions on matrices. Quantised values are fp32 numbers that the small format can hold, so that products of them
are exact and a cast to `torch.float8_e4m3fn` loses nothing. Scales are what a value is multiplied by to get it back
(`weight_scale_inv` in published checkpoints).

What is decided here where the report is silent:

- Rounding is to nearest, ties to even; values beyond the largest saturate, which takes rounding errors of the
  division alone, since a tile's largest magnitude becomes the format's.
- An infinity or a NaN becomes NaN, and the rest of its tile is scaled by its finite elements: one bad element neither
  hides, clipped to a number, nor takes others with it.
- A tile of zeros has scale 1. No scale is below 2**-126, the smallest normal fp32.
- A partial tile at the edge is a tile of what is there.

Shapes: M rows and N columns of a matrix; m and n tiles over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Format:
    """A floating-point format without infinities."""

    name: str
    mantissa_bits: int
    smallest_exponent: int
    """Of normal numbers."""
    largest: float


E4M3 = Format("E4M3", 3, -6, 448.0)
E5M6 = Format("E5M6", 6, -14, 65024.0)
"""DeepSeek's own 12 bits for what the linear layer after attention keeps for its backward pass; range as of fp16."""


class Tiling(NamedTuple):
    """Rows and columns that share a scale; 0 stands for all of them."""

    rows: int
    columns: int

    def turned(self) -> Tiling:
        """The tiling of the transposed matrix."""
        return Tiling(self.columns, self.rows)


TILE, BLOCK, WHOLE = Tiling(1, 128), Tiling(128, 128), Tiling(0, 0)


class Quantised(NamedTuple):
    """A quantised matrix."""

    values_MN: Tensor
    """fp32 numbers of the format."""
    scales_mn: Tensor
    """fp32, one a tile."""
    tiling: Tiling


def rounded(x: Tensor, format: Format) -> Tensor:
    """Each finite fp32 number rounded to the nearest of the format, ties to even, saturating; NaN stays NaN.

    Adding 1.5 * 2**23 steps and taking them away again leaves whole steps, rounded as fp32 addition rounds.
    """
    clipped = x.clamp(-format.largest, format.largest)
    power = (clipped.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**format.smallest_exponent)
    anchor = power.mul_(1.5 * 2.0 ** (23 - format.mantissa_bits))
    return (clipped + anchor).sub_(anchor).copysign_(clipped)


def power_of_two_above(scales: Tensor) -> Tensor:
    """The smallest power of two that is not below each positive normal fp32 number."""
    return ((scales.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def quantise(x_MN: Tensor, tiling: Tiling, format: Format = E4M3, power_of_two: bool = False) -> Quantised:
    """A matrix in a small format, with the scale of each tile chosen from its largest magnitude.

    scale = largest magnitude / largest number of the format, in fp32, rounded up to a power of two where requested;
    value = round(x / scale), the quotient in fp32 first.

    Args:
        x_MN: matrix of any floating-point type.
        tiling: what shares a scale.
        format: number format of the values.
        power_of_two: whether scales are powers of two, so that dividing by them is exact.
    """
    tiles = tiled(x_MN.float(), tiling)
    largest = tiles.abs().amax((1, 3)) if tiles.numel() else tiles.new_ones(tiles.shape[0], tiles.shape[2])
    if not bool(largest.isfinite().all()):
        tiles = tiles.masked_fill(tiles.isinf(), float("nan"))
        largest = tiles.abs().nan_to_num(0.0).amax((1, 3))
    scales_mn = scales_of(largest, format)
    if power_of_two:
        scales_mn = power_of_two_above(scales_mn)
    values = rounded(tiles / scales_mn[:, None, :, None], format)
    return Quantised(untiled(values, x_MN), scales_mn, tiling)


def scales_of(largest_mn: Tensor, format: Format = E4M3) -> Tensor:
    """The scale of each tile from its largest magnitude, in fp32."""
    # A tensor divisor: by a plain number some devices multiply by the rounded inverse instead.
    scales_mn = (largest_mn / torch.full_like(largest_mn, format.largest)).clamp_(min=SMALLEST_SCALE)
    return scales_mn.masked_fill_(largest_mn == 0, 1.0)


def dequantise(quantised: Quantised) -> Tensor:
    """The matrix that a quantised one stands for: fp32 [M, N]."""
    tiles = tiled(quantised.values_MN, quantised.tiling) * quantised.scales_mn[:, None, :, None]
    return untiled(tiles, quantised.values_MN)


def through(x_MN: Tensor, tiling: Tiling, format: Format = E4M3, power_of_two: bool = False) -> Tensor:
    """Quantised and dequantised: the fp32 matrix that a product sees."""
    return dequantise(quantise(x_MN, tiling, format, power_of_two))


def tiled(x_MN: Tensor, tiling: Tiling) -> Tensor:
    """[m, rows of a tile, n, columns of a tile], edges filled with zeros, which no largest magnitude notices."""
    rows, columns = (size or max(whole, 1) for size, whole in zip(tiling, x_MN.shape, strict=True))
    below, beside = -x_MN.shape[0] % rows, -x_MN.shape[1] % columns
    if below or beside:
        x_MN = F.pad(x_MN, (0, beside, 0, below))
    return x_MN.reshape(x_MN.shape[0] // rows, rows, x_MN.shape[1] // columns, columns)


def untiled(tiles: Tensor, like_MN: Tensor) -> Tensor:
    """The matrix of these tiles, without what filled the edges."""
    m, rows, n, columns = tiles.shape
    return tiles.reshape(m * rows, n * columns)[: like_MN.shape[0], : like_MN.shape[1]]
