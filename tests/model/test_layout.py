"""Names, shapes and sharding of the CPU model against the stored list of Transformer Engine's."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_r1.model.build import native_tensors
from tests.support.layouts import model_of, te_layout
from tests.support.whole_models import native_shapes

SHAPES = ("tiny", "direct_query", "grouped_bias", "grouped_norm", "grouped_experts")


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_the_stored_ones(shape, new_model):
    stored = {name: entry.shape for name, entry in te_layout(shape).items()}
    assert native_shapes(model_of(shape)) == stored
    assert {name: tuple(tensor.shape) for name, tensor in native_tensors(new_model(model_of(shape)))} == stored


@pytest.mark.parametrize("shape", SHAPES)
def test_two_tensor_parallel_ranks_share_the_stored_dimensions(shape, two_ranks):
    stored = {name: entry.local_shape(2) for name, entry in te_layout(shape).items()}
    for rank in two_ranks:
        assert {name: tuple(found["shape"]) for name, found in rank["layouts"][shape].items()} == stored


@pytest.mark.parametrize("shape", SHAPES)
def test_shards_say_where_they_belong_in_the_whole(shape, two_ranks):
    experts = 8 if shape == "tiny" else 4
    for (name, entry), (rank, found) in itertools.product(te_layout(shape).items(), enumerate(two_ranks)):
        shards = found["layouts"][shape][name]["shards"]
        assert len(shards) == entry.parts, name
        leading = [] if entry.expert is None else [experts]
        for part, shard in enumerate(shards):
            offset = [0] * len(entry.shape)
            if entry.split is not None:
                # Rank 0's part of the gate, rank 1's, then the same of the up projection.
                offset[entry.split] = (2 * part + rank) * entry.shape[entry.split] // (2 * entry.parts)
            assert shard["global_shape"] == leading + list(entry.shape), name
            assert shard["experts_axis"] == len(leading), name
            assert shard["offset"] == ([] if entry.expert is None else [entry.expert]) + offset, name


@pytest.mark.parametrize("shape", SHAPES)
def test_main_shards_make_up_each_tensor_exactly_once(shape, two_ranks):
    filled: dict[str, int] = {}
    keys, wholes = set(), {}
    for rank in two_ranks:
        for shard in (shard for found in rank["layouts"][shape].values() for shard in found["shards"]):
            wholes[shard["key"]] = math.prod(shard["global_shape"])
            if shard["main"]:
                key = shard["key"], *shard["offset"]
                assert key not in keys
                keys.add(key)
                filled[shard["key"]] = filled.get(shard["key"], 0) + math.prod(shard["local_shape"])
    assert filled == wholes
