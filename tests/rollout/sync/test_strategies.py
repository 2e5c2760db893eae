"""What is sent is what was given: buckets, what belongs together, names and number formats, without a server."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import DataError
from megatron_r1.hf.export import hf_tensors
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sync.buckets import Bucket, LooseBucket, NamedTensor, fill_buckets, plan_buckets
from megatron_r1.rollout.sync.payload import FusedGroups, WeightPayload, fused_name
from tests.support.layouts import model_of
from tests.support.whole_models import expected_shapes, native_shapes

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


def one_by_one(tensors):
    return [[NamedTensor(name, tensor)] for name, tensor in tensors]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3), st.sampled_from(DTYPES)), min_size=1, max_size=20),
    st.integers(1, 400),
)
def test_every_tensor_arrives_once_in_order_and_as_planned(sizes, capacity):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (f"weight-{number}", torch.randint(0, 255, (columns, rows), generator=generator).to(dtype).t())
        for number, (rows, columns, dtype) in enumerate(sizes)
    ]
    arrived, lasts, entries = [], [], []
    for bucket, last in fill_buckets(Bucket(capacity, "cpu"), one_by_one(tensors)):
        now = received(bucket)
        assert bucket.content.numel() <= capacity or len(now) == 1
        arrived += now
        lasts.append(last)
        entries.append(bucket.entries)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    assert [name for name, _ in arrived] == [name for name, _ in tensors]
    assert all(torch.equal(left, right) for (_, left), (_, right) in zip(arrived, tensors, strict=True))
    items = [[Entry(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in tensors]
    assert plan_buckets(items, capacity) == entries
    loose = [
        (bucket.description(), bucket.parts) for bucket, _ in fill_buckets(LooseBucket(capacity), one_by_one(tensors))
    ]
    assert [told["names"] for told, _ in loose] == [[entry.name for entry in bucket] for bucket in entries]
    sent = [part for _, parts in loose for part in parts]
    assert all(torch.equal(part, tensor) for part, (_, tensor) in zip(sent, tensors, strict=True))
    assert all(part.is_contiguous() for part in sent)


def test_a_loose_bucket_copies_nothing_and_holds_nothing_once_it_is_sent():
    tensors = one_by_one([(str(number), torch.zeros(10)) for number in range(5)])
    own = [group[0].tensor.data_ptr() for group in tensors]
    bucket = LooseBucket(80)
    sent = [[part.data_ptr() for part in filled.parts] for filled, _ in fill_buckets(bucket, tensors)]
    assert sent == [own[:2], own[2:4], own[4:]]
    bucket.clear()
    assert not bucket.parts


def test_units_of_several_number_formats_lie_at_multiples_of_their_elements():
    units = [[NamedTensor(f"{n}.weight", torch.zeros(3, dtype=torch.uint8)), NamedTensor(f"{n}.scale", torch.ones(1))]
             for n in range(3)]  # fmt: skip
    buckets = [received(bucket) for bucket, _ in fill_buckets(Bucket(1000, "cpu"), units)]
    assert [[name for name, _ in bucket] for bucket in buckets] == [[f"{n}.scale", f"{n}.weight"] for n in range(3)]


def test_small_tensors_share_a_bucket_and_large_memory_is_given_back():
    tensors = one_by_one([(str(number), torch.zeros(10)) for number in range(10)])
    assert [len(bucket.entries) for bucket, _ in fill_buckets(Bucket(120, "cpu"), tensors)] == [3, 3, 3, 1]
    sizes = one_by_one([("a", torch.zeros(5)), ("b", torch.zeros(500)), ("c", torch.zeros(5))])
    held = [bucket.content.untyped_storage().nbytes() for bucket, _ in fill_buckets(Bucket(120, "cpu"), sizes)]
    assert held == [120, 2000, 120]


def test_weights_may_change_once_the_next_is_requested():
    memory = torch.zeros(4)

    def one_memory():
        for number in range(3):
            yield [NamedTensor(str(number), memory.fill_(number))]

    (bucket,) = [bucket for bucket, _ in fill_buckets(Bucket(1000, "cpu"), one_memory())]
    assert [float(tensor[0]) for _, tensor in received(bucket)] == [0.0, 1.0, 2.0]


def units_of(names):
    return [
        [one.name for one in unit]
        for unit in FusedGroups(names).collect([NamedTensor(name, torch.zeros(2)) for name in names])
    ]


@pytest.mark.parametrize("query", ["q_a_proj", "q_proj"])
def test_down_projections_of_a_layer_stay_together(query):
    names = [
        f"model.layers.{layer}.self_attn.{part}.weight"
        for layer in (1, 11)
        for part in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", query)
    ]
    pairs = [[names[0], names[3]], [names[4], names[7]]] if query == "q_a_proj" else []
    units = units_of(names)
    assert [unit for unit in units if len(unit) == 2] == pairs
    assert sorted(name for unit in units for name in unit) == sorted(names)


def test_joined_weights_of_a_dense_model_stay_together():
    names = [name for name in expected_shapes(model_of("grouped_bias")) if "layers.0" in name]
    units = units_of(names)
    assert sorted(name for unit in units for name in unit) == sorted(names)
    short = [[name.removeprefix("model.layers.0.") for name in unit] for unit in units if len(unit) > 1]
    assert sorted(short) == [
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        *[[f"self_attn.{part}_proj.{kind}" for part in "qkv"] for kind in ("bias", "weight")],
    ]


def test_a_weight_and_its_scales_stay_together_with_their_partners():
    layer = "model.layers.0.self_attn"
    names = [
        f"{layer}.{part}.weight{kind}" for part in ("q_a_proj", "kv_a_proj_with_mqa") for kind in ("", "_scale_inv")
    ]
    assert units_of(names) == [names]
    assert fused_name("a.mlp.experts.3.down_proj.weight_scale_inv") == "a.mlp.experts.3.down_proj.weight"


def test_half_a_pair_and_what_was_not_announced_and_nothing_at_all_are_refused():
    names = ["model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    with pytest.raises(DataError, match="q_a_proj"):
        list(FusedGroups(names).collect([NamedTensor(names[0], torch.zeros(2))]))
    with pytest.raises(DataError, match=r"other.weight: is not in the plan"):
        list(FusedGroups(names).collect([NamedTensor("other.weight", torch.zeros(2))]))
    with pytest.raises(DataError, match="no weights"):
        list(fill_buckets(Bucket(100, "cpu"), []))


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


@pytest.mark.parametrize("shape", ["tiny", "direct_query", "grouped", "grouped_bias", "grouped_experts"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("include_mtp", [False, True])
def test_what_is_sent_is_what_was_announced(shape, fp8, include_mtp):
    model = model_of(shape)
    payload = WeightPayload(model, include_mtp, fp8)
    native = {name: torch.randn(size) for name, size in native_shapes(model).items()}
    sent = list(payload.tensors(native.items(), complete=True))
    announced = [item for name in native for item in payload.entries(name)]
    assert [Entry(one.name, one.dtype, one.shape) for one in sent] == announced
    assert {one.name for one in sent if not one.name.endswith("_scale_inv")} == expected_shapes(
        model, include_mtp=include_mtp
    ).keys()


def test_linear_layers_are_sent_in_fp8_blocks():
    """The tensors themselves, against blocks computed one by one; edges of 128 are crossed in both dimensions."""
    model = ModelConfig(hidden_size=136, ffn_hidden_size=264, vocab_size=200)
    generator = torch.Generator().manual_seed(0)
    native = {name: torch.randn(shape, generator=generator) for name, shape in native_shapes(model).items()}
    plain = {one.name: one.tensor for one in WeightPayload(model).tensors(native.items(), complete=True)}
    sent = {one.name: one.tensor for one in WeightPayload(model, fp8=True).tensors(native.items(), complete=True)}
    scaled = {name.removesuffix("_scale_inv") for name in sent if name.endswith("_scale_inv")}
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
    assert scaled == {name for name in plain if not any(part in name for part in kept)}
    for name, weight_MN in plain.items():
        if name not in scaled:
            assert torch.equal(sent[name], weight_MN)
            continue
        values_MN, scales_mn = sent[name], sent[f"{name}_scale_inv"]
        assert values_MN.dtype == torch.float8_e4m3fn and scales_mn.dtype == torch.float32
        for m, rows in enumerate(weight_MN.split(128)):
            for n, block in enumerate(rows.split(128, 1)):
                scale = block.abs().max() / 448
                part = values_MN[m * 128 : m * 128 + 128, n * 128 : n * 128 + 128]
                assert torch.equal(scales_mn[m, n], scale)
                assert torch.equal(part, (block / scale).to(torch.float8_e4m3fn))
    with pytest.raises(DataError, match=r"o_proj.weight: .*infinity or a NaN"):
        native["decoder.layers.0.self_attention.linear_proj.weight"][3, 5] = math.inf
        list(WeightPayload(model, fp8=True).tensors(native.items(), complete=True))


def test_endpoint_travels_with_its_keys_and_prints_without():
    endpoint = Endpoint("http://127.0.0.1:1", "first-secret", "second-secret")
    assert "secret" not in f"{endpoint} {endpoint!r}"
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint
