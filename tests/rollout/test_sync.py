"""What is sent is what was given: buckets, pairs and names, without a server."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.attention import GroupedAttentionConfig
from megatron_r1.config.model import MixtureConfig, ModelConfig, MultiTokenConfig
from megatron_r1.errors import DataError
from megatron_r1.hf.export import hf_tensors
from megatron_r1.hf.names import expected_shapes, native_shapes
from megatron_r1.rollout.sglang.buckets import Bucket, buckets, together
from megatron_r1.rollout.sglang.client import Endpoint

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def received(bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """What a server reads out of the bytes, which must hold nothing else."""
    told = bucket.description()
    content, offset, tensors = bucket.content, 0, []
    for name, dtype_name, shape in zip(told["names"], told["dtypes"], told["shapes"], strict=True):
        dtype = getattr(torch, dtype_name)
        assert offset % dtype.itemsize == 0
        size = math.prod(shape) * dtype.itemsize
        tensors.append((name, content[offset : offset + size].clone().view(dtype).view(shape)))
        offset += size
    assert offset == content.numel()
    return tensors


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3), st.sampled_from(DTYPES)), min_size=1, max_size=20),
    st.integers(1, 400),
)
def test_every_tensor_arrives_once_in_order(sizes, capacity):
    generator = torch.Generator().manual_seed(0)
    given = [
        (f"weight-{number}", torch.randint(0, 255, (columns, rows), generator=generator).to(dtype).t())
        for number, (rows, columns, dtype) in enumerate(sizes)
    ]
    arrived, lasts = [], []
    for bucket, last in buckets(iter(given), capacity, "cpu"):
        tensors = received(bucket)
        assert bucket.content.numel() <= capacity or len(tensors) == 1
        arrived += tensors
        lasts.append(last)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    assert [name for name, _ in arrived] == [name for name, _ in given]
    assert all(torch.equal(left, right) for (_, left), (_, right) in zip(arrived, given, strict=True))


def test_small_tensors_share_a_bucket():
    tensors = [(str(number), torch.zeros(10)) for number in range(10)]
    assert [len(bucket.names) for bucket, _ in buckets(tensors, 120, "cpu")] == [3, 3, 3, 1]


def test_weights_may_change_once_the_next_is_asked_for():
    memory = torch.zeros(4)

    def one_memory():
        for number in range(3):
            yield str(number), memory.fill_(number)

    (bucket,) = [bucket for bucket, _ in buckets(one_memory(), 1000, "cpu")]
    assert [float(tensor[0]) for _, tensor in received(bucket)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("query", ["q_a_proj", "q_proj"])
def test_down_projections_of_a_layer_stay_together(query):
    names = [
        f"model.layers.{layer}.self_attn.{part}.weight"
        for layer in (1, 11)
        for part in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", query)
    ]
    given = [(name, torch.zeros(8)) for name in names]
    units = [[name for name, _ in unit] for unit in together(given)]
    assert [[names[0], names[3]], [names[4], names[7]]] == [unit for unit in units if len(unit) == 2]
    assert sorted(name for unit in units for name in unit) == sorted(names)
    assert [names[0], names[3]] in [bucket.names.copy() for bucket, _ in buckets(given, 1, "cpu")]


def test_tensors_of_a_dense_model_come_one_by_one():
    model = ModelConfig(
        attention=GroupedAttentionConfig(), moe=MixtureConfig.none(), mtp=MultiTokenConfig(num_layers=0)
    )
    names = [name for name in expected_shapes(model) if "layers.0" in name]
    assert any(name.endswith("q_proj.weight") for name in names)
    assert [[name for name, _ in unit] for unit in together([(name, torch.zeros(2)) for name in names])] == [
        [name] for name in names
    ]


def test_half_a_pair_and_nothing_at_all_are_refused():
    with pytest.raises(DataError, match="q_a_proj"):
        list(together([("model.layers.0.self_attn.q_a_proj.weight", torch.zeros(2))]))
    with pytest.raises(DataError, match="no weights"):
        list(buckets([], 100, "cpu"))


def test_hf_tensors_of_a_whole_model_and_of_a_part():
    model = ModelConfig()
    native = {name: torch.zeros(shape) for name, shape in native_shapes(model).items()}
    whole = dict(hf_tensors(native.items(), model, include_mtp=False, dtype=torch.bfloat16))
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == expected_shapes(model, include_mtp=False)
    for name, tensor in whole.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)
    part = [(name, tensor) for name, tensor in native.items() if name.startswith("decoder.layers.1.")]
    assert all(name.startswith("model.layers.1.") for name, _ in hf_tensors(part, model, complete=False))
    with pytest.raises(DataError, match="missing"):
        list(hf_tensors(part, model))


def test_hf_tensors_are_views_where_nothing_has_to_change():
    model = ModelConfig()
    native = {name: torch.zeros(shape) for name, shape in native_shapes(model, include_mtp=False).items()}
    memory = {tensor.untyped_storage().data_ptr() for tensor in native.values()}
    sent = hf_tensors(native.items(), model, include_mtp=False)
    assert {tensor.untyped_storage().data_ptr() for _, tensor in sent} == memory


def test_endpoint_travels_with_its_keys_and_prints_without():
    endpoint = Endpoint("http://127.0.0.1:1", "first-secret", "second-secret")
    assert "secret" not in f"{endpoint} {endpoint!r}"
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint
