"""Folders as transformers saves them and as people bring them: each loads as it should, or a line names what is odd."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_r1.__main__ import exit_code
from megatron_r1.checkpoint.store import OneRank
from megatron_r1.config.load import load
from megatron_r1.errors import UserError
from megatron_r1.hf.model_config import model_of_folder
from megatron_r1.runs.initial_weights import find_initial_model, find_weights
from tests.support.conversions import convert, hf_of, native_run, native_weights, same_bits
from tests.support.hf_folders import edit_json, edit_tensors, write_folder_of

Change = Callable[[Path], object]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a kind, written once a session. For reading only."""
    root = tmp_path_factory.mktemp("saved")
    kinds = {"tied": ("qwen2", {"tie_word_embeddings": True})}

    def of(kind: str) -> Path:
        family, changes = kinds.get(kind, (kind, {}))
        return root / kind if (root / kind).exists() else write_folder_of(family, root / kind, **changes)

    return of


@pytest.fixture
def copy_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a folder, changed."""

    def of(kind: str, change: Change = lambda _: None) -> Path:
        shutil.copytree(saved(kind), tmp_path / "folder")
        change(tmp_path / "folder")
        return tmp_path / "folder"

    return of


def config(**changes: object) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    return lambda folder: edit_tensors(folder / "model.safetensors", change)


def store_head(scale: float) -> Change:
    return tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING] * scale}))


def store_frequencies(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder / "model.safetensors", lambda stored: stored.update({name: torch.ones(8)}))


def in_shards(folder: Path) -> None:
    """Two shards with an index, and one that an earlier save left behind."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({EMBEDDING: torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")


def in_shards_and_whole(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    in_shards(folder)
    (folder / "model.safetensors").write_bytes(content)


def with_mark(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def linked(folder: Path) -> None:
    """As a download cache has it: every file a link to its content elsewhere."""
    blobs = folder.with_name("blobs")
    folder.rename(blobs)
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


EXTRA_NORM = tensors(lambda stored: stored.update({"model.layers.3.enorm.weight": torch.ones(64)}))

RIGHT: dict[str, tuple[str, Change]] = {
    "multi-token layers not stored": ("deepseek_v3", config(num_nextn_predict_layers=1)),
    "two multi-token layers not stored": ("deepseek_v3", config(num_nextn_predict_layers=2, num_mtp_layers=...)),
    "multi-token layers under the newer key": ("deepseek_v3", config(num_nextn_predict_layers=..., num_mtp_layers=1)),
    "number of multi-token layers null": ("deepseek_v3", config(num_nextn_predict_layers=None, num_mtp_layers=None)),
    "nulls for what is derived": ("deepseek_v3", config(num_key_value_heads=None, rope_interleave=None)),
    "nulls for defaults": (
        "llama",
        config(mlp_bias=None, pretraining_tp=None, tie_word_embeddings=None, initializer_range=None, rope_scaling=None),
    ),
    "width of heads null": ("llama", config(head_dim=None)),
    "sliding window null": ("qwen3", config(use_sliding_window=None, layer_types=None, sliding_window=None)),
    "positions in the older keys": ("llama", config(rope_parameters=..., rope_theta=10000.0, rope_scaling=None)),
    "type in the older key": ("llama", config(dtype=..., torch_dtype="float32")),
    "type not named": ("llama", config(dtype=None)),
    "architectures null": ("llama", config(architectures=None)),
    "tied, with a stored head": ("tied", store_head(1.0)),
    "frequencies stored": ("llama", store_frequencies),
    "shards, and one left over": ("qwen3", in_shards),
    "byte order mark before config.json": ("llama", with_mark("config.json")),
    "byte order mark before the tokenizer": ("llama", with_mark("tokenizer_config.json")),
    "links": ("llama", linked),
    "unknown keys": ("llama", config(unsloth_version="2026.1", torch_compile=None, auto_map={"AutoModel": "a.B"})),
}


@pytest.mark.parametrize("oddity", RIGHT)
def test_a_folder_with_an_oddity_is_the_same_model(oddity: str, saved, copy_of, tmp_path: Path) -> None:
    kind, change = RIGHT[oddity]
    folder, plain = copy_of(kind, change), find_weights(f"hf:{saved(kind)}")
    found = find_weights(f"hf:{folder}")
    assert found.model == plain.model
    assert found.tokenizer().fingerprint() == plain.tokenizer().fingerprint()
    assert same_bits(dict(found.tensors), dict(plain.tensors))
    exported = convert(f"hf:{folder}", tmp_path / "run")
    assert same_bits(hf_of(exported), hf_of(saved(kind)))
    assert model_of_folder(exported) == plain.model and json.loads((exported / "config.json").read_text())


NAMED: dict[str, tuple[str, Change, str]] = {
    "tied, with another head": ("tied", store_head(2.0), "lm_head.weight differs .* tie_word_embeddings"),
    "head missing": (
        "llama",
        tensors(lambda stored: stored.pop(HEAD)),
        "lm_head.weight: missing.* tie_word_embeddings",
    ),
    "fewer layers than stored": ("llama", config(num_hidden_layers=1), "layers.1.* num_hidden_layers"),
    "part of a multi-token layer": ("deepseek_v3", EXTRA_NORM, "model.layers.3.* missing"),
    "multi-token layer not named": (
        "deepseek_v3",
        both(EXTRA_NORM, config(num_nextn_predict_layers=0, num_mtp_layers=...)),
        "layers.3.enorm.weight: no tensor of this model.* num_nextn_predict_layers",
    ),
    "another head than a language model's": (
        "llama",
        config(architectures=["LlamaForSequenceClassification"]),
        "architectures=.*LlamaForSequenceClassification.*must be LlamaForCausalLM",
    ),
    "part of a head turned": (
        "llama",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor=0.5",
    ),
    "attention factor": (
        "deepseek_v3",
        config(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "attention_factor": 0.7,
                "original_max_position_embeddings": 256,
            }
        ),
        "attention_factor=0.7",
    ),
    "sliding windows": ("qwen3", config(layer_types=["full_attention", "sliding_attention"]), "layer_types=sliding"),
    "sliding windows by the older key": ("qwen2", config(use_sliding_window=True), "use_sliding_window=True"),
    "half precision": ("llama", config(dtype="float16"), "dtype=float16"),
    "width null": ("llama", config(hidden_size=None), "hidden_size is missing"),
    "one file and an index of others": (
        "llama",
        in_shards_and_whole,
        "model.safetensors and model.safetensors.index.json",
    ),
    "pickled weights": (
        "llama",
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "shards without an index": (
        "llama",
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
        "neither model.safetensors nor .*, only model-00001",
    ),
    "adapter names": (
        "llama",
        tensors(lambda stored: stored.update({"base_model.model.lm_head.lora_A.weight": torch.ones(2)})),
        "lora_A.weight: no tensor of this model",
    ),
    "another kind of model": ("llama", config(model_type="mixtral"), "model_type=mixtral: must be one of"),
    "bits and bytes": (
        "llama",
        config(quantization_config={"quant_method": "bitsandbytes"}),
        "quant_method=bitsandbytes",
    ),
    "no tokenizer": ("llama", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: cannot be read"),
    "no end token": (
        "llama",
        lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=None),
        "eos_token: tokenizer_config.json does not name",
    ),
}


@pytest.mark.parametrize("oddity", NAMED)
def test_a_folder_that_is_no_such_model_is_refused_by_what_is_odd(oddity: str, copy_of) -> None:
    kind, change, message = NAMED[oddity]
    with pytest.raises(UserError, match=message) as error:
        found = find_weights(f"hf:{copy_of(kind, change)}")
        found.tokenizer()
        dict(found.tensors)
    assert "\n" not in str(error.value)


HARMLESS: tuple[Change, ...] = (
    config(mlp_bias=None, head_dim=None, rope_scaling=None),
    config(dtype=None),
    config(architectures=None),
    config(unsloth_version="2026.1", auto_map={"AutoModel": "a.B"}),
    config(initializer_range=...),
    store_frequencies,
    in_shards,
    with_mark("config.json"),
    with_mark("tokenizer_config.json"),
    lambda folder: edit_json(folder / "generation_config.json", eos_token_id=None, transformers_version=None),
)
FAULTS: dict[str, tuple[str, dict[str, object]]] = {
    "model_type=mixtral": ("config.json", {"model_type": "mixtral"}),
    "architectures=": ("config.json", {"architectures": ["LlamaModel"]}),
    "hidden_act=gelu": ("config.json", {"hidden_act": "gelu"}),
    "attention_bias=True": ("config.json", {"attention_bias": True}),
    "layer_types=chunked": ("config.json", {"layer_types": ["chunked_attention"] * 2}),
    "partial_rotary_factor=0.25": ("config.json", {"partial_rotary_factor": 0.25}),
    "quant_method=gptq": ("config.json", {"quantization_config": {"quant_method": "gptq"}}),
    "rope_scaling type linear": ("config.json", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}),
    "vocab_size is missing": ("config.json", {"vocab_size": None}),
    "eos_token_id=99999": ("generation_config.json", {"eos_token_id": [99999]}),
}
"""What is said of a fault -> the file that has it, and its keys."""


def test_of_twenty_oddities_in_one_folder_each_is_right_or_named(saved, copy_of) -> None:
    """Ten faults are mended one after the other, as each is named, and ten more oddities do no harm."""
    folder = copy_of("llama", both(*HARMLESS))
    sound = {file: (folder / file).read_bytes() for file, _ in FAULTS.values()}
    present = dict(FAULTS)
    while True:
        for file, content in sound.items():
            (folder / file).write_bytes(content)
        for file, changes in present.values():
            edit_json(folder / file, **changes)
        try:
            found = find_weights(f"hf:{folder}")
            found.tokenizer()
            break
        except UserError as error:
            (named,) = [said for said in present if said in str(error)]
            del present[named]
    assert not present
    plain = find_weights(f"hf:{saved('llama')}")
    assert found.model == plain.model and same_bits(dict(found.tensors), dict(plain.tensors))


def test_multi_token_layers_are_left_out_where_the_run_has_none(tmp_path: Path, capsys) -> None:
    model = load("convert", ["model.num_layers=2"]).model
    assert model.mtp.num_layers == 1
    whole = convert(native_run(tmp_path / "run", model, native_weights(model)), tmp_path / "whole")
    arguments = ["convert", f"root={tmp_path}", "model.mtp.num_layers=0"]
    for name, source in (("native", f"{tmp_path}/run"), ("folder", f"hf:{whole}")):
        assert exit_code([*arguments, f"name={name}", f"init.from={source}"]) == 0, capsys.readouterr().err
        exported = hf_of(tmp_path / name / "hf")
        assert exported.keys() == {key for key in hf_of(whole) if not key.startswith("model.layers.2.")}
        assert model_of_folder(tmp_path / name / "hf").mtp.num_layers == 0
        found = find_initial_model(source)
        served = found.serving(replace(model, mtp=replace(model.mtp, num_layers=0)))
        tensors, kept = found.weights(OneRank()).tensors, served.weights(OneRank()).tensors
        assert kept.keys() == {name for name in tensors if not name.startswith("mtp.")}
        assert found.serving(model) is found and served.model.mtp.num_layers == 0


def test_missing_multi_token_layers_are_said_once(saved, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO):
        convert(f"hf:{saved('deepseek_v3')}", tmp_path / "run", to="native")
    (line,) = [one.message for one in caplog.records if "layers" in one.message]
    assert line.endswith("num_nextn_predict_layers=1, but the folder stores no such layers; the model has these alone")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "tied", "deepseek_v3"])
def test_what_is_exported_again_computes_the_same(kind: str, saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    native = convert(f"hf:{saved(kind)}", tmp_path / "native", to="native")
    exported = convert(native, tmp_path / "again")
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (saved(kind), exported)]
    tokens = torch.randint(0, 500, (2, 60), generator=torch.Generator().manual_seed(1))
    before, after = (model.eval()(tokens).logits for model in models)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
