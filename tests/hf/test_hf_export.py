"""Export and load: against transformers' own writer and reader, and against damaged input."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_r1.config.model import ModelConfig, MoeConfig, MtpConfig
from megatron_r1.errors import DataError
from tests.support.whole_models import expected_shapes, export, load_tensors, native_shapes

RandomTensors = Callable[[ModelConfig], dict[str, Tensor]]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_expected_shapes_are_what_transformers_writes(model: ModelConfig, oracle_folder: Path) -> None:
    written = load_file(oracle_folder / "model.safetensors")
    assert expected_shapes(model, include_mtp=False) == {name: tuple(tensor.shape) for name, tensor in written.items()}


def test_transformers_weights_there_and_back(
    model: ModelConfig, oracle: torch.nn.Module, oracle_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    native = dict(load_tensors(oracle_folder, model, include_mtp=False))
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == native_shapes(model, include_mtp=False)
    folder = export(native.items(), model, tmp_path / "hf", include_mtp=False)
    assert same(load_file(folder / "model.safetensors"), load_file(oracle_folder / "model.safetensors"))

    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert same(loaded.state_dict(), oracle.state_dict())
    tokens = torch.randint(0, model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, oracle(tokens).logits)


def test_transformers_loads_an_export_with_multi_token_layers(
    model: ModelConfig, oracle: torch.nn.Module, oracle_folder: Path, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    native = random_tensors(model) | dict(load_tensors(oracle_folder, model, include_mtp=False))
    folder = export(native.items(), model, tmp_path / "hf")
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert same(loaded.state_dict(), oracle.state_dict())
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    multi_token = tuple(f"model.layers.{model.num_layers + depth}." for depth in range(model.mtp.num_layers))
    assert all(name.startswith(multi_token) for name in report["unexpected_keys"])

    from transformers.modeling_layers import MtpModel

    # transformers knows the layer number of the 671B model only; it raises when a name is missing.
    loaded._keys_to_ignore_on_load_unexpected = [f"^{prefix.replace('.', '[.]')}" for prefix in multi_token]
    drafter = dict(MtpModel.from_pretrained(loaded).named_parameters())
    for depth in range(model.mtp.num_layers):
        layer, ours = f"layers.{depth}.", f"mtp.layers.{depth}."
        assert torch.equal(drafter[f"{layer}enorm.weight"], native[f"{ours}enorm.weight"])
        assert torch.equal(drafter[f"{layer}hnorm.weight"], native[f"{ours}hnorm.weight"])
        assert torch.equal(drafter[f"{layer}eh_proj.weight"], native[f"{ours}eh_proj.weight"])
        assert torch.equal(drafter[f"{layer}post_norm.weight"], native[f"{ours}final_layernorm.weight"])
        block, experts = f"{layer}mtp_block.", f"{ours}mtp_model_layer.mlp.experts."
        assert torch.equal(drafter[f"{block}mlp.experts.gate_up_proj"][3], native[f"{experts}linear_fc1.weight3"])


def test_gate_is_the_first_half(oracle: torch.nn.Module, model: ModelConfig, oracle_folder: Path) -> None:
    native = dict(load_tensors(oracle_folder, model, include_mtp=False))
    layer, last = model.num_layers - 1, model.moe.num_experts - 1
    experts = oracle.get_submodule(f"model.layers.{layer}.mlp.experts")
    fused = native[f"decoder.layers.{layer}.mlp.experts.linear_fc1.weight{last}"]
    assert torch.equal(fused, experts.gate_up_proj[last])
    shared = oracle.get_submodule(f"model.layers.{layer}.mlp.shared_experts")
    fused = native[f"decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight"]
    assert torch.equal(fused[: len(fused) // 2], shared.gate_proj.weight)


def test_export_and_load_with_multi_token_layers(
    model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    native = random_tensors(model)
    folder = export(reversed(native.items()), model, tmp_path / "hf")
    written = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected_shapes(model)
    embedding = native["embedding.word_embeddings.weight"]
    assert torch.equal(written[f"model.layers.{model.num_layers}.embed_tokens.weight"], embedding)
    assert same(dict(load_tensors(folder, model)), native)


def test_shards_hold_the_same_tensors(one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path) -> None:
    native, limit = random_tensors(one_model), 20_000
    folder = export(native.items(), one_model, tmp_path / "hf", shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["weight_map"].keys() == expected_shapes(one_model).keys()
    stored = [load_file(file) for file in files]
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= limit for shard in stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for shard in stored for tensor in shard.values())
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same(dict(load_tensors(folder, one_model)), native)


def test_export_in_bfloat16_keeps_the_bias_in_float32(
    one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    native = random_tensors(one_model)
    folder = export(native.items(), one_model, tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in load_tensors(folder, one_model):
        if name.endswith("expert_bias"):
            assert torch.equal(tensor, native[name])
        else:
            assert torch.equal(tensor, native[name].bfloat16())


def test_old_multi_token_names_and_parameters_are_accepted(
    one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    native = random_tensors(one_model)
    old = {name.replace("mtp_model_layer", "transformer_layer"): torch.nn.Parameter(t) for name, t in native.items()}
    assert same(dict(load_tensors(export(old.items(), one_model, tmp_path / "hf"), one_model)), native)


def test_multi_token_layers_are_dropped_when_requested(
    one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    folder = export(random_tensors(one_model).items(), one_model, tmp_path / "hf", include_mtp=False)
    assert load_file(folder / "model.safetensors").keys() == expected_shapes(one_model, include_mtp=False).keys()
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
    with pytest.raises(DataError, match=r"model\.layers\.3\..*: missing"):
        next(load_tensors(folder, one_model))


def drop(name: str) -> Callable[[dict[str, Tensor]], list[tuple[str, Tensor]]]:
    return lambda native: [item for item in native.items() if item[0] != name]


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], list[tuple[str, Tensor]]]:
    return lambda native: [*native.items(), (name, torch.zeros(shape))]


def reshape(name: str, *shape: int) -> Callable[[dict[str, Tensor]], list[tuple[str, Tensor]]]:
    return lambda native: list((native | {name: torch.zeros(shape)}).items())


EXPERT = "decoder.layers.1.mlp.experts.linear_fc1.weight7"
BROKEN_STREAMS = {
    "expert missing": (drop(EXPERT), f"{EXPERT}: missing"),
    "bias missing": (drop("decoder.layers.2.mlp.router.expert_bias"), "expert_bias: missing"),
    "multi-token tensor missing": (drop("mtp.layers.0.eh_proj.weight"), "eh_proj.weight: missing"),
    "everything missing": (lambda native: [], "missing"),
    "expert too many": (add(EXPERT.replace("weight7", "weight8"), 40, 24), "weight8: no tensor"),
    "foreign tensor": (add("decoder.rotary.inv_freq", 3), "inv_freq: no tensor"),
    "wrong shape": (reshape(EXPERT, 24, 40), r"has shape \(24, 40\), must have \(40, 24\)"),
    "one shard only": (reshape("embedding.word_embeddings.weight", 33, 24), "must have"),
    "twice": (add("output_layer.weight", 67, 24), "output_layer.weight: given twice"),
    "twice, old name": (add("mtp.layers.0.transformer_layer.mlp.router.expert_bias", 8), "given twice"),
}


@pytest.mark.parametrize("damage", BROKEN_STREAMS)
def test_broken_stream_publishes_nothing(
    damage: str, one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    break_stream, message = BROKEN_STREAMS[damage]
    with pytest.raises(DataError, match=message):
        export(break_stream(random_tensors(one_model)), one_model, tmp_path / "hf", shard_bytes=20_000)
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_the_earlier_one(
    one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    native = random_tensors(one_model)
    folder = export(native.items(), one_model, tmp_path / "hf")
    (tmp_path / "hf.tmp").mkdir()  # as a killed export leaves it
    with pytest.raises(DataError):
        export(drop(EXPERT)(native), one_model, folder)
    assert same(dict(load_tensors(folder, one_model)), native)
    doubled = {name: 2 * tensor for name, tensor in native.items()}
    export(doubled.items(), one_model, folder)
    assert same(dict(load_tensors(folder, one_model)), doubled)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_of_something_else_is_not_replaced(
    one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="name a new folder"):
        export(random_tensors(one_model).items(), one_model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_tokenizer_goes_along(one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    added = [{"id": number, "content": text} for number, text in enumerate(("<pad>", "<bos>", "<eos>"))]
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    named = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    folder = export(random_tensors(one_model).items(), one_model, tmp_path / "hf", tokenizer_folder=source)
    for file in source.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        assert [config[f"{token}_token_id"] for token in ("pad", "bos", "eos")] == [0, 1, 2]

    (source / "tokenizer_config.json").write_text(json.dumps(named | {"eos_token": "<end>"}))
    with pytest.raises(DataError, match="eos_token '<end>'"):
        export(random_tensors(one_model).items(), one_model, tmp_path / "other", tokenizer_folder=source)
    assert not (tmp_path / "other").exists()


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def _set(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder, lambda stored: stored.update({name: tensor}))


BROKEN_FOLDERS = {
    "missing tensor": (lambda folder: _rewrite(folder, lambda stored: stored.pop("model.norm.weight")), "missing"),
    "unknown tensor": (_set("model.norm.weight_scale_inv", torch.ones(1)), "weight_scale_inv: no tensor"),
    "wrong shape": (_set("model.norm.weight", torch.ones(25)), r"has shape \(25,\), must have \(24,\)"),
    "differing copy": (_set("model.layers.3.shared_head.head.weight", torch.ones(67, 24)), "differs from lm_head"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "cannot be read",
    ),
    "pickle": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.bin"}}'),
        "must name a .safetensors file",
    ),
    "outside": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "../m.safetensors"}}'
        ),
        "must name a .safetensors file",
    ),
    "index elsewhere": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "model.safetensors"}}'
        ),
        "does not place there",
    ),
}


@pytest.mark.parametrize("damage", BROKEN_FOLDERS)
def test_broken_folder_is_refused(
    damage: str, one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    break_folder, message = BROKEN_FOLDERS[damage]
    folder = export(random_tensors(one_model).items(), one_model, tmp_path / "hf")
    break_folder(folder)
    with pytest.raises(DataError, match=message):
        dict(load_tensors(folder, one_model))


def test_tensor_in_two_files_is_refused(one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path) -> None:
    folder = export(random_tensors(one_model).items(), one_model, tmp_path / "hf", shard_bytes=60_000)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    stored = load_file(second)
    save_file(stored | dict(list(load_file(first).items())[:1]), second)
    with pytest.raises(DataError, match="stored twice"):
        dict(load_tensors(folder, one_model))


def test_export_is_quick_enough_for_a_weight_push(random_tensors: RandomTensors, tmp_path: Path) -> None:
    """The quickstart's model: pushed to the rollout engine once a step, so well under a tenth of a second."""
    model = ModelConfig(moe=MoeConfig(group_top_k=1), mtp=MtpConfig(num_layers=1))
    native = random_tensors(model)
    seconds = []
    for number in range(4):
        start = time.perf_counter()
        export(native.items(), model, tmp_path / str(number), include_mtp=False)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3, seconds  # 0.03 on a quiet machine; the limit only sees a blunder
