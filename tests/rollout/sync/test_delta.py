"""Deltas: applied to what a server has they give the new weights bit by bit, and they are never larger."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_r1.rollout.sglang.delta import KeepWhereNan
from megatron_r1.rollout.sync.buckets import Bucket, NamedTensor
from megatron_r1.rollout.sync.delta import MARK, SentBuckets, decode, encode

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (7,), (3, 5), (16, 8), (0, 4), (2, 3, 11))


def bucket_of(tensors: list[torch.Tensor]) -> Bucket:
    bucket = Bucket(1 << 12, "cpu")
    bucket.add([NamedTensor(f"weight.{number}", tensor) for number, tensor in enumerate(tensors)])
    return bucket


def applied(before: list[torch.Tensor], delta: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a server's parameters are after it has loaded a delta."""
    parameters = [nn.Parameter(tensor.clone()) for tensor in before]
    with KeepWhereNan():
        for parameter, tensor in zip(parameters, delta, strict=True):
            parameter.data.copy_(tensor)
    return [parameter.data for parameter in parameters]


def same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    dtypes=st.lists(st.sampled_from(TYPES), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_what_changed_brings_a_server_to_the_new_bits(seed: int, dtypes: list[torch.dtype], share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtypes = sorted(dtypes, key=lambda dtype: -dtype.itemsize)
    shapes = [SHAPES[int(torch.randint(len(SHAPES), (), generator=draw))] for _ in dtypes]
    before = [torch.randn(shape, generator=draw).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    after = [torch.where(torch.rand(old.shape, generator=draw) < share, -old, old) for old in before]
    now = bucket_of(after)
    found = encode(now.entries, now.content, bucket_of(before).content)
    assert found is not None
    counts, content = found
    changed = [int((old.ne(new)).sum()) for old, new in zip(before, after, strict=True)]
    assert all(count in (one, new.numel()) for count, one, new in zip(counts, changed, after, strict=True))
    exact = sum(
        min(new.nbytes, math.ceil(new.numel() / 8) * bool(one) + one * new.itemsize) if new.numel() > 1 else new.nbytes
        for one, new in zip(changed, after, strict=True)
    )
    assert content.nbytes == exact <= now.content.nbytes
    delta = [tensor.clone() for tensor in decode(now.entries, counts, content)]
    assert [tensor.shape for tensor in delta] == [tensor.shape for tensor in after]
    assert same_bits(applied(before, delta), after)


def test_zero_and_minus_zero_differ() -> None:
    before, after = bucket_of([torch.zeros(64)]), bucket_of([torch.zeros(64).index_fill(0, torch.tensor([3]), -0.0)])
    found = encode(after.entries, after.content, before.content)
    assert found is not None and found[0] == [1]


def test_a_nan_is_not_said_by_a_delta() -> None:
    before, after = torch.zeros(64), torch.zeros(64)
    after[5] = math.nan
    now = bucket_of([after])
    assert encode(now.entries, now.content, bucket_of([before]).content) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_loaders_that_shard_fuse_and_convert_keep_what_is_nan(dtype: torch.dtype) -> None:
    """As SGLang's loaders write: a part of the source into a part of a fused parameter, in another type."""
    fused = nn.Parameter(torch.arange(24.0).view(6, 4))
    source = torch.full((4, 4), math.nan, dtype=dtype)
    source[2, 1] = -1.0
    with KeepWhereNan():
        fused.data.narrow(0, 3, 2).copy_(source.narrow(0, 2, 2))
    expected = torch.arange(24.0).view(6, 4)
    expected[3, 1] = -1.0
    assert torch.equal(fused.data, expected)
    fused.data.copy_(torch.full((6, 4), math.nan))
    assert fused.isnan().all(), "outside of the block a copy is a copy"


def test_a_bucket_is_whole_at_first_and_when_it_holds_other_tensors() -> None:
    sent, weights = SentBuckets(), [torch.ones(64), torch.ones(64)]

    def mark(number: int, tensors: list[torch.Tensor]) -> tuple[bool, int]:
        described, (content,) = sent.message(number, bucket_of(tensors))
        assert len(described["names"]) == len(described["dtypes"]) == len(described["shapes"])
        return described["dtypes"][-1] == MARK, content.nbytes

    assert mark(1, weights) == (False, 512)
    assert mark(2, weights[:1]) == (False, 256)
    weights[1][9] = 2.0
    assert mark(1, weights) == (True, 8 + 4)
    assert mark(1, weights) == (True, 0)
    assert mark(2, weights) == (False, 512)
    assert mark(2, weights) == (True, 0)
    assert SentBuckets().message(1, bucket_of(weights))[1][0].nbytes == 512
