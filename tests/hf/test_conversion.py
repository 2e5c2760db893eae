"""Both directions in every format: bit for bit, whatever the family, however many files and processes."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.config.model import AttentionConfig, ModelConfig
from megatron_r1.hf.audit import check_audit, read_audit
from megatron_r1.hf.config import QUANTIZATION_CONFIG
from megatron_r1.hf.folder import TensorFolder
from tests.support.conversions import convert, hf_of, in_precision, native_of, native_run, native_weights, same_bits
from tests.support.draws import GROUPED, grouped_shape, sparse_shape
from tests.support.whole_models import expected_shapes

TINY = load("pretrain", []).model


def tiny(**changes: object) -> ModelConfig:
    """The tiny model with two layers; blocks of 128 x 128 are partial in it, and several."""
    attention = AttentionConfig(
        q_lora_rank=72, kv_lora_rank=40, qk_nope_head_dim=40, qk_rope_head_dim=16, v_head_dim=48
    )
    return replace(TINY, num_layers=2, hidden_size=200, ffn_hidden_size=264, attention=attention, **changes)


FAMILIES = {
    "v3": lambda: tiny(),
    "v2": lambda: tiny(moe=replace(TINY.moe, score_function="softmax"), mtp=replace(TINY.mtp, num_layers=0)),
    "v2-lite": lambda: tiny(
        moe=replace(TINY.moe, score_function="softmax", num_groups=1, group_top_k=1, num_shared_experts=2),
        mtp=replace(TINY.mtp, num_layers=0),
    ),
    "moonlight": lambda: tiny(
        moe=replace(TINY.moe, num_groups=1, group_top_k=1, num_shared_experts=2, scaling_factor=2.446),
        mtp=replace(TINY.mtp, num_layers=0),
        norm_epsilon=1e-5,
    ),
    **{kind: lambda kind=kind: replace(grouped_shape(kind, 2), hidden_size=264) for kind in GROUPED},
    "tied": lambda: grouped_shape("qwen2", 1),
}
for name in ("v2-lite", "moonlight"):
    FAMILIES[name] = lambda make=FAMILIES[name]: replace(
        make(), attention=replace(make().attention, q_lora_rank=0)
    )  # queries are projected directly
DRAWN = {f"sparse-{seed}": sparse_shape(seed) for seed in range(11)} | {
    f"{kind}-{seed}": grouped_shape(kind, seed) for kind in GROUPED for seed in range(3)
}
FORMATS = ("fp32", "bf16", "fp8")


def there_and_back(model: ModelConfig, folder: Path, shard_gb: float) -> dict[str, Path]:
    """Native to HF to native bit for bit, and from each HF format to native and back bit for bit."""
    model = in_precision(model, "fp32")
    weights = native_weights(model)
    source, made = native_run(folder / "run", model, weights), {}
    for format in FORMATS:
        # Scales of fp32 weights come back from fp32; those of bf16 weights from bf16, too.
        native = "bf16" if format == "bf16" else "fp32"
        made[format] = convert(source, folder / format, dtype=format, max_shard_gb=shard_gb)
        back = convert(
            f"hf:{made[format]}", folder / f"{format}-back", to="native", dtype=native, max_shard_gb=shard_gb
        )
        again = convert(folder / f"{format}-back", folder / f"{format}-again", dtype=format, max_shard_gb=shard_gb)
        assert same_bits(hf_of(again), hf_of(made[format])), format
        assert json.loads((again / "config.json").read_text()) == json.loads((made[format] / "config.json").read_text())
        if format == "fp32":
            assert same_bits(native_of(back), weights)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = FAMILIES[family]()
    elements = sum(map(prod, expected_shapes(model).values()))
    made = there_and_back(model, tmp_path, shard_gb=elements * 2 / 4e9)
    assert len(list(made["bf16"].glob("*.safetensors"))) > 2
    plain = convert(f"hf:{made['fp8']}", tmp_path / "plain", dtype="bf16")
    for folder in (made["fp32"], plain):
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"], report
        multi_token = f"model.layers.{model.num_layers}."
        assert all(name.startswith(multi_token) for name in report["unexpected_keys"])
        stored = hf_of(folder)
        assert torch.equal(loaded.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    config = json.loads((made["fp8"] / "config.json").read_text())
    assert config.pop("quantization_config") == QUANTIZATION_CONFIG and config["torch_dtype"] == "bfloat16"
    assert config == json.loads((plain / "config.json").read_text())


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_shapes_there_and_back(name: str, tmp_path: Path) -> None:
    there_and_back(DRAWN[name], tmp_path, shard_gb=5.0)


def test_bf16_runs_in_fp8_there_and_back(tmp_path: Path) -> None:
    """Scales of bf16 weights survive bf16: FP8 to BF16 to FP8, as folders and as checkpoints."""
    model = in_precision(tiny(), "bf16")
    source = native_run(tmp_path / "run", model, native_weights(model))
    first = convert(source, tmp_path / "fp8", dtype="fp8")
    plain = convert(f"hf:{first}", tmp_path / "bf16", dtype="bf16")
    assert same_bits(hf_of(convert(f"hf:{plain}", tmp_path / "again", dtype="fp8")), hf_of(first))
    native = convert(f"hf:{first}", tmp_path / "native", to="native")
    assert {tensor.dtype for name, tensor in native_of(native).items() if "expert_bias" not in name} == {torch.bfloat16}
    assert same_bits(hf_of(convert(tmp_path / "native", tmp_path / "out", dtype="fp8")), hf_of(first))
    assert same_bits(hf_of(convert(tmp_path / "native", tmp_path / "o2")), hf_of(plain))


def test_an_fp8_folder_is_divided_anew_without_being_quantised_anew(tmp_path: Path) -> None:
    """Scales that no quantiser here would choose are passed on as they are."""
    model = tiny()
    folder = convert(native_run(tmp_path / "run", model, native_weights(model)), tmp_path / "a", dtype="fp8")
    from safetensors.torch import save_file

    tensors = hf_of(folder)
    tensors = {name: t * 1.7 if name.endswith("_scale_inv") else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    again = convert(f"hf:{folder}", tmp_path / "b", max_shard_gb=2e-4)
    assert len(list(again.glob("*.safetensors"))) > 5
    assert same_bits(hf_of(again), tensors)


def test_the_audit_proves_it(tmp_path: Path) -> None:
    model = tiny()
    weights = native_weights(model)
    folder = convert(native_run(tmp_path / "run", model, weights), tmp_path / "a", dtype="fp8", max_shard_gb=2e-4)
    audit = read_audit(folder)
    assert check_audit(audit, TensorFolder(folder), weights) == len(hf_of(folder)) + len(weights)
    native = convert(f"hf:{folder}", tmp_path / "b", to="native", max_shard_gb=2e-4)
    assert check_audit(read_audit(native), native_of(native), TensorFolder(folder))
    fused = "decoder.layers.1.mlp.experts.linear_fc1.weight3"
    parts = [f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up")]
    assert audit["read"][fused]["to"] == [each for part in parts for each in (part, f"{part}_scale_inv")]
    assert read_audit(native)["read"][f"{parts[1]}_scale_inv"]["to"] == [fused]
    plain = convert(f"hf:{folder}", tmp_path / "c", dtype="bf16", max_shard_gb=2e-4)
    assert check_audit(read_audit(plain), TensorFolder(plain), TensorFolder(folder))
    assert [read_audit(plain)["read"][name]["to"] for name in (parts[0], f"{parts[1]}_scale_inv")] == [
        [parts[0]],
        [parts[1]],
    ]
    copies = ["model.embed_tokens.weight", "model.layers.2.embed_tokens.weight"]
    assert audit["read"]["embedding.word_embeddings.weight"]["to"] == copies


def test_a_padded_vocabulary_there_and_back(tmp_path: Path) -> None:
    """As tensor parallelism may want it: rows of zeros at the end of embedding and head, and of their copies."""
    model = tiny(vocab_size=67)
    weights = native_weights(model)
    first = convert(native_run(tmp_path / "run", model, weights), tmp_path / "first")
    padded = native_of(convert(f"hf:{first}", tmp_path / "padded", to="native", vocab_size=80))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert padded[name].shape == (80, 200) and not padded[name][67:].any()
        assert torch.equal(padded[name][:67], weights[name])
    assert same_bits(hf_of(convert(tmp_path / "padded", tmp_path / "cut", vocab_size=67)), hf_of(first))
    wider = convert(f"hf:{first}", tmp_path / "wider", vocab_size=128)
    assert hf_of(wider)["model.layers.2.embed_tokens.weight"].shape == (128, 200)
    assert json.loads((wider / "config.json").read_text())["vocab_size"] == 128
    assert check_audit(read_audit(wider), TensorFolder(wider), TensorFolder(first))
    back = convert(f"hf:{wider}", tmp_path / "back", vocab_size=67)
    assert same_bits(hf_of(back), hf_of(first))
