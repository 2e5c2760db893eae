"""Quantisers against loops over single numbers in float64 with a rounding of their own, bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_r1.model.fp8.quantise import (
    BLOCK,
    E4M3,
    E5M6,
    TILE,
    WHOLE,
    Tiling,
    dequantise,
    power_of_two_above,
    quantise,
    rounded,
    through,
)

BITS = {"E4M3": (3, -6, 448.0), "E5M6": (6, -14, 65024.0)}


def nearest(x: float, name: str) -> float:
    """Of all numbers of the format the nearest to x, of two equally near the one with an even last digit."""
    bits, smallest_exponent, largest = BITS[name]
    if math.isnan(x) or math.isinf(x):
        return math.nan
    exponent = max(math.frexp(x)[1] - 1, smallest_exponent)
    step = 2.0 ** (exponent - bits)
    whole, rest = divmod(abs(x) / step, 1.0)
    if rest > 0.5 or (rest == 0.5 and whole % 2):
        whole += 1
    return math.copysign(min(whole * step, largest), x)


def single(x: float) -> float:
    """Rounded to fp32. Quotients and products of two fp32 numbers, rounded to float64 first, come out the same."""
    return float(np.float32(x))


def by_loops(x_MN: np.ndarray, tiling: Tiling, name: str, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales, a tile at a time."""
    M, N = x_MN.shape
    rows, columns = tiling.rows or M, tiling.columns or N
    values = np.empty((M, N))
    scales = np.empty((math.ceil(M / rows), math.ceil(N / columns)))
    for i, j in itertools.product(*map(range, scales.shape)):
        positions = [
            (r, c)
            for r in range(i * rows, min((i + 1) * rows, M))
            for c in range(j * columns, min((j + 1) * columns, N))
        ]
        largest = max((abs(float(x_MN[at])) for at in positions if math.isfinite(x_MN[at])), default=0.0)
        scale = max(single(largest / BITS[name][2]), 2.0**-126)
        if power_of_two:
            mantissa, exponent = math.frexp(scale)
            scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
        scales[i, j] = scale = 1.0 if largest == 0 else scale
        for at in positions:
            x = float(x_MN[at])
            values[at] = nearest(single(x / scale), name) if math.isfinite(x) else math.nan
    return values, scales


def same_bits(mine: torch.Tensor, reference: np.ndarray) -> bool:
    """Equal bit for bit; any NaN is as good as another."""
    expected = torch.from_numpy(reference.astype(np.float32))
    assert mine.dtype == torch.float32 and mine.shape == expected.shape
    both = mine.isnan() & expected.isnan()
    return bool((both | (mine.view(torch.int32) == expected.view(torch.int32))).all())


def matrix(kind: str, M: int, N: int) -> torch.Tensor:
    """Numbers of many sizes, and what is special about them by kind."""
    generator = torch.Generator().manual_seed(M * 1000 + N)
    x = torch.randn(M, N, generator=generator) * 10 ** (torch.rand(M, N, generator=generator) * 6 - 3)
    if kind == "zero tiles":
        x[: M // 2 + 1] = 0.0
        x[-1, -1] = -0.0
    elif kind == "not finite":
        x[0, 0], x[M // 2, N // 2], x[-1, -1] = float("inf"), float("nan"), -float("inf")
    elif kind == "nothing finite":
        x[:] = float("nan")
    elif kind == "subnormal":
        x *= 2.0**-140
    elif kind == "vanishing":
        x = torch.full((M, N), 1e-45)
    elif kind == "huge":
        x = x.clamp(-1, 1) * 3.4e38
    elif kind == "ties":
        # Halfway between neighbours of E4M3, at scale 1: the largest is 448.
        x = (
            torch.arange(M * N, dtype=torch.float32).remainder(900).view(M, N)
            / 2
            * torch.tensor([1.0, -1.0])[torch.arange(N) % 2]
        )
        x[:, 0], x[0] = 448.0, 448.0
    elif kind == "bf16":
        x = x.bfloat16()
    return x


KINDS = ["ordinary", "zero tiles", "not finite", "nothing finite", "subnormal", "vanishing", "huge", "ties", "bf16"]


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32 scales", "powers of two"])
@pytest.mark.parametrize("format", [E4M3, E5M6], ids=lambda format: format.name)
@pytest.mark.parametrize("tiling", [TILE, TILE.turned(), BLOCK, WHOLE], ids=str)
def test_values_and_scales_are_those_of_the_loops(tiling, format, power_of_two):
    whole_blocks = [("ordinary", (129, 130))] if tiling == BLOCK else []
    for kind, (M, N) in [*itertools.product(KINDS, [(130, 3), (2, 129), (3, 5)]), *whole_blocks]:
        x_MN = matrix(kind, M, N)
        found = quantise(x_MN, tiling, format, power_of_two)
        values, scales = by_loops(x_MN.float().numpy(), tiling, format.name, power_of_two)
        assert same_bits(found.scales_mn, scales), (kind, M, N)
        assert same_bits(found.values_MN, values), (kind, M, N)
        rows, columns = tiling.rows or M, tiling.columns or N
        whole = np.kron(scales, np.ones((rows, columns)))[:M, :N]
        with np.errstate(over="ignore"):
            assert same_bits(dequantise(found), (values * whole).astype(np.float32)), (kind, M, N)


@pytest.mark.parametrize("format", [E4M3, E5M6], ids=lambda format: format.name)
def test_every_number_of_a_format_and_what_lies_between_is_rounded_as_by_hand(format):
    bits, smallest, largest = BITS[format.name]
    numbers = {m * 2.0 ** (smallest - bits) for m in range(2**bits)}
    numbers |= {
        (1 + m / 2**bits) * 2.0**e
        for e in range(smallest, int(math.log2(largest)) + 1)
        for m in range(2**bits)
        if (1 + m / 2**bits) * 2.0**e <= largest
    }
    ordered = sorted(numbers)
    assert len(ordered) == (127 if format is E4M3 else 31 * 64)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ordered)]
    beside = [float(np.nextafter(np.float32(x), np.float32(to))) for x in middles for to in (0, 1e9)]
    x = torch.tensor([*ordered, *middles, *beside, largest * 1.01, 1e30, 0.0])
    x = torch.cat([x, -x])
    assert same_bits(rounded(x, format), np.array([nearest(float(each), format.name) for each in x]))
    assert torch.equal(rounded(torch.tensor(ordered), format), torch.tensor(ordered))
    assert rounded(torch.tensor([math.nan]), format).isnan().all()


def test_values_are_those_of_torchs_own_type():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 200
    x = torch.cat([x, x * 1e-3, x * 1e-5])
    theirs = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(rounded(x, E4M3).view(torch.int32), theirs.view(torch.int32))
    values = quantise(torch.randn(64, 256), TILE).values_MN
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)


def test_powers_of_two_do_not_change_under_another_tiling():
    """Why the report asks for them: tiles of 1x128 become tiles of 128x1 with no error where no value was subnormal."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).abs() + 0.5
    for power_of_two in (True, False):
        once = through(x, TILE, power_of_two=power_of_two)
        again = through(once, TILE.turned(), power_of_two=power_of_two)
        assert torch.equal(once, again) == power_of_two


def test_the_power_above_is_the_smallest_that_holds():
    x = torch.tensor([1.0, 1.0000001, 1.9999999, 2.0, 2.0**-126, 7.6e35, 0.3])
    assert power_of_two_above(x).tolist() == [2.0 ** math.ceil(math.log2(each)) for each in x.double().tolist()]


def test_an_error_is_at_most_half_a_step():
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    for tiling in (TILE, BLOCK, WHOLE):
        largest = through(torch.ones_like(x), tiling)
        assert torch.equal(largest, torch.ones_like(x))
        error = (through(x, tiling) - x).abs()
        # Half of 2**-3 of the value, or half a smallest step of the tile's scale, whose largest value is below 6 here.
        assert (error <= (x.abs() * 2.0**-4).clamp(min=6 / 448 * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", [(0, 256), (5, 0), (0, 0)])
def test_nothing_is_quantised_to_nothing(shape):
    for tiling in (TILE, TILE.turned(), BLOCK, WHOLE):
        assert through(torch.empty(shape), tiling).shape == shape


def test_blocks_of_a_published_weight_have_the_published_shape_of_scales():
    assert quantise(torch.randn(576, 7168), BLOCK).scales_mn.shape == (5, 56)
