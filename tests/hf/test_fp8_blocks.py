"""FP8 in blocks: against a block-by-block computation in float64, and converted again to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1.hf import fp8_blocks
from megatron_r1.hf.fp8_blocks import FP8, StoredTensor, as_fp32, dequantise_blocks, quantise_blocks, scale_shape

DTYPES = (torch.float32, torch.bfloat16)


def same(left: StoredTensor, right: StoredTensor) -> bool:
    assert left.scale_inv is not None and right.scale_inv is not None
    bits = torch.equal(left.weight.view(torch.uint8), right.weight.view(torch.uint8))
    return bits and torch.equal(left.scale_inv.view(torch.int32), right.scale_inv.view(torch.int32))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Of any size, each block with a spread and a magnitude of its own, zeros among them; in either type."""
    M, N = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    shape = scale_shape((M, N))
    spread, power = torch.rand(shape, generator=generator) * 8, torch.randint(-60, 60, shape, generator=generator)
    fine = torch.randn(M, N, generator=generator).double()
    whole = torch.ones(128, 128, dtype=torch.float64)
    matrix = fine.sign() * fine.abs() ** torch.kron(spread.double(), whole)[:M, :N]
    matrix *= torch.kron(torch.exp2(power.double()), whole)[:M, :N]
    matrix[torch.rand(M, N, generator=generator) < 0.1] = 0
    if draw(st.booleans()):
        matrix[:128, :128] = 0
    return matrix.to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_converted_again_nothing_changes(weight: Tensor) -> None:
    first = quantise_blocks(weight)
    for dtype in (torch.float32, weight.dtype):
        plain = dequantise_blocks(first, dtype)
        assert plain.dtype == dtype and plain.shape == weight.shape
        assert same(quantise_blocks(plain), first)


def test_every_significand_of_a_scale_comes_back() -> None:
    """The one place where it could fail: 448 s rounded, over 448. All 2**23 largest magnitudes of a binade."""
    amax = torch.arange(1 << 23, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    largest = torch.full_like(amax, 448.0)
    scale = amax / largest
    assert torch.equal((scale * largest) / largest, scale)
    other = torch.arange(1 << 23, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    assert not torch.equal((other * largest) / largest, other)  # scales that are no such quotient need not


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (576, 7168 // 16), (300, 515)])
def test_blocks_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    stored = quantise_blocks(weight)
    assert stored.weight.dtype == FP8 and stored.scale_inv is not None
    assert stored.scale_inv.shape == scale_shape(shape) == (-(-shape[0] // 128), -(-shape[1] // 128))
    exact, values = weight.double().numpy(), stored.weight.float().double().numpy()
    plain = dequantise_blocks(stored, torch.float32).numpy()
    for (m, n), scale in np.ndenumerate(stored.scale_inv.numpy()):
        place = slice(128 * m, 128 * m + 128), slice(128 * n, 128 * n + 128)
        block = exact[place]
        assert scale == np.float32(np.float32(np.abs(block).max()) / np.float32(448))
        assert np.abs(values[place]).max() == 448
        quotient = (block.astype(np.float32) / scale).astype(np.float64)
        # Half a step of E4M3: 3 bits of significand, and 2**-9 among the subnormal numbers.
        step = np.exp2(np.floor(np.log2(np.maximum(np.abs(quotient), 2.0**-6))) - 3)
        assert (np.abs(values[place] - quotient) <= step / 2).all()
        assert np.array_equal(plain[place], values[place].astype(np.float32) * scale)


def test_dequantising_multiplies_in_fp32() -> None:
    """A bf16 product with a bf16 scale, as some readers compute it, is another number."""
    weight = torch.full((128, 128), 1.75).to(FP8)
    scale = torch.tensor([[1.006]])
    exact = (weight.float() * scale).bfloat16()
    assert torch.equal(dequantise_blocks(StoredTensor(weight, scale), torch.bfloat16), exact)
    assert not torch.equal(weight.bfloat16() * scale.bfloat16(), exact)


def test_zeros_and_what_has_no_place() -> None:
    stored = quantise_blocks(torch.zeros(130, 5))
    assert not dequantise_blocks(stored, torch.float32).any() and bool((stored.scale_inv > 0).all())
    for bad in (float("inf"), float("nan")):
        weight = torch.ones(200, 200)
        weight[199, 0] = bad
        with pytest.raises(ValueError, match="infinity or a NaN"):
            quantise_blocks(weight)


def test_every_number_of_eight_bits_in_fp32() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    for values in (every, every[:127], every[128:255]):
        ours, theirs = as_fp32(values), values.float()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num().view(torch.int32), theirs.nan_to_num().view(torch.int32))
    assert float(as_fp32(every[126:127])) == 448 and float(as_fp32(every[1:2])) == 2.0**-9


@pytest.mark.parametrize("slab", [1, 1 << 15, 1 << 30])
def test_how_much_is_taken_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    weight = torch.randn(300, 520, generator=torch.Generator().manual_seed(4))
    expected = quantise_blocks(weight)
    monkeypatch.setattr(fp8_blocks, "_SLAB", slab)
    found = quantise_blocks(weight)
    assert torch.equal(found.weight.view(torch.uint8), expected.weight.view(torch.uint8))
    assert found.scale_inv is not None and expected.scale_inv is not None
    assert torch.equal(found.scale_inv, expected.scale_inv)


def test_an_expert_is_one_wait_for_a_gpu() -> None:
    shape = 2048, 7168  # of DeepSeek-V3
    assert len(list(fp8_blocks._slabs(torch.empty(shape, device="meta")))) == 1
    assert len(list(fp8_blocks._slabs(torch.empty(shape)))) == 16
