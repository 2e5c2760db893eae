"""Every kind of damage stops a conversion with one line, and nothing is written; training refuses the folder alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, write_manifest
from megatron_r1.checkpoint.sharded import TensorPart, WholeTensors, write_parts
from megatron_r1.config.load import load
from megatron_r1.errors import DataError, UserError
from megatron_r1.hf.audit import check_audit, read_audit
from megatron_r1.hf.folder import INDEX_FILE, TensorFolder
from megatron_r1.runs.initial_weights import find_weights
from tests.support.conversions import convert, hf_of, native_of, native_run, native_weights

MODEL = load("convert", ["model.num_layers=2"]).model
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
SCALE = f"{EXPERT}_scale_inv"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_run(tmp_path_factory.mktemp("native") / "run", MODEL, native_weights(MODEL))


@pytest.fixture(scope="module")
def sound(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 folder of several files."""
    return convert(checkpoint, tmp_path_factory.mktemp("sound") / "run", dtype="fp8", max_shard_gb=1e-4)


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]


def tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Rewrite the file that holds a tensor."""

    def damage(folder: Path) -> None:
        path = file_of(folder, name)
        stored = load_file(path)
        change(stored)
        save_file(stored, path, {"format": "pt"})
        _index_again(folder)

    return damage


def put(name: str, make: Callable[[Tensor], Tensor]) -> Damage:
    return tensors(name, lambda stored: stored.update({name: make(stored[name])}))


def add(name: str, tensor: Tensor) -> Damage:
    return tensors(EXPERT, lambda stored: stored.update({name: tensor}))


def config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        change(content["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(content))

    return damage


def raw(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = file_of(folder, EXPERT)
        path.write_bytes(change(path.read_bytes()))

    return damage


def _index_again(folder: Path) -> None:
    weight_map = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def _in_another_file(folder: Path) -> None:
    other = next(file for file in sorted(folder.glob("*.safetensors")) if file != file_of(folder, EXPERT))
    save_file(load_file(other) | {EXPERT: load_file(file_of(folder, EXPERT))[EXPERT]}, other)


def _twice_in_a_header(content: bytes) -> bytes:
    """A second entry of the same name after the first, which most readers would take instead."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().rstrip()
    entry = json.dumps({EXPERT: json.loads(header)[EXPERT]})[1:-1]
    header = f"{header[:-1]},{entry}}}"
    header += " " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header.encode() + content[8 + length :]


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


DAMAGES: dict[str, tuple[Damage, str]] = {
    "expert missing": (tensors(EXPERT, lambda stored: stored.pop(EXPERT)), f"{EXPERT}: missing"),
    "extra expert": (add(EXPERT.replace(".5.", ".8."), torch.ones(4)), "experts.8.up_proj.weight: no tensor of this"),
    "wrong shape": (put(EXPERT, lambda t: t.t().contiguous()), r"has shape \(128, 64\), must have \(64, 128\)"),
    "wrong type": (put(EXPERT, lambda t: t.float()), f"{EXPERT}: has type F32, must have F8_E4M3"),
    "other eight bits": (put(EXPERT, lambda t: t.view(torch.float8_e5m2)), "has type F8_E5M2, must have F8_E4M3"),
    "norm in FP8": (put("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)), "has type F8_E4M3, must have BF16"),
    "type of no model": (put("model.norm.weight", lambda t: t.to(torch.int16)), "has type I16"),
    "scale missing": (tensors(SCALE, lambda stored: stored.pop(SCALE)), f"{SCALE}: missing"),
    "scale of one number": (put(SCALE, lambda t: torch.ones(1)), r"scale_inv: has shape \(1,\), must have \(1, 1\)"),
    "scale in bf16": (put(SCALE, lambda t: t.bfloat16()), "scale_inv: has type BF16, must have F32"),
    "scale NaN": (put(SCALE, first(float("nan"))), "scale_inv: holds nan, must hold finite numbers above 0"),
    "scale infinite": (put(SCALE, first(float("inf"))), "scale_inv: holds inf"),
    "scale zero": (put(SCALE, first(0.0)), "scale_inv: holds 0.0"),
    "scale of a norm": (add("model.norm.weight_scale_inv", torch.ones(1)), "norm.weight_scale_inv: no tensor of this"),
    "in two files": (_in_another_file, "is stored twice|does not place there"),
    "twice in a header": (raw(_twice_in_a_header), f"{EXPERT} is stored twice|cannot be read"),
    "cut off": (raw(lambda content: content[:-5]), "cannot be read"),
    "grown": (raw(lambda content: content + b"12345678"), "cannot be read"),
    "header garbage": (raw(lambda content: content[:8] + b"\xff" * 64 + content[72:]), "cannot be read"),
    "header of an exabyte": (raw(lambda content: (1 << 60).to_bytes(8, "little") + content[8:]), "cannot be read"),
    "empty file": (raw(lambda content: b""), "cannot be read"),
    "file missing": (lambda folder: file_of(folder, EXPERT).unlink(), "cannot be read"),
    "index to another folder": (
        index(lambda where: where.update({EXPERT: "../model.safetensors"})),
        "must name a .safetensors file beside it",
    ),
    "index to a pickle": (index(lambda where: where.update({EXPERT: "pytorch_model.bin"})), "must name a .safetensors"),
    "index to a file without it": (index(lambda where: where.update(ghost=where[EXPERT])), "ghost: missing from"),
    "index lacks it": (index(lambda where: where.pop(EXPERT)), "does not place there"),
    "index is a list": (lambda folder: (folder / INDEX_FILE).write_text('{"weight_map": []}'), "weight_map must say"),
    "copy differs": (
        put("model.layers.2.shared_head.head.weight", first(3.0)),
        "shared_head.head.weight differs from lm_head.weight",
    ),
    "config lacks quantization_config": (config(quantization_config="absent"), "no tensor of this model"),
    "config says other blocks": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
        "quantization_config.weight_block_size",
    ),
    "config says another method": (config(quantization_config={"quant_method": "gptq"}), "quant_method=gptq"),
    "config says another size": (
        config(num_hidden_layers=3),
        "eh_proj.weight: no tensor of this model; problems in all",
    ),
    "config lacks a key": (config(kv_lora_rank="absent"), "kv_lora_rank is missing"),
    "config says another function": (config(hidden_act="gelu"), "hidden_act=gelu: must be silu"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
}


def refused(source: str, run_folder: Path, message: str, **settings: object) -> None:
    with pytest.raises(DataError, match=message) as error:
        convert(source, run_folder, **settings)
    assert "\n" not in str(error.value)
    own = ("config.yaml", "environment.json", "provenance")
    assert not [path for path in run_folder.glob("*") if path.name not in own]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_nothing_is_written(damage: str, sound: Path, tmp_path: Path) -> None:
    break_folder, message = DAMAGES[damage]
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    break_folder(folder)
    conversions: list[dict[str, Any]] = [{"dtype": "bf16"}, {"to": "native"}, {"dtype": "bf16", "workers": 2}]
    for number, settings in enumerate(conversions):
        if settings.get("workers") != 2 or damage == "copy differs":
            refused(f"hf:{folder}", tmp_path / str(number), message, **settings)
    with pytest.raises(DataError, match=message):
        dict(find_weights(f"hf:{folder}").tensors)


def test_an_undamaged_folder_is_accepted(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "folder")
    _index_again(tmp_path / "folder")
    convert(f"hf:{tmp_path / 'folder'}", tmp_path / "run", dtype="bf16")
    assert len(dict(find_weights(f"hf:{sound}").tensors)) == len(native_weights(MODEL))


NATIVE = "decoder.layers.1.mlp.experts.linear_fc1.weight5"
CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "expert missing": (lambda weights: weights.pop(NATIVE), f"{NATIVE}: missing"),
    "expert too many": (lambda weights: weights.update({NATIVE[:-1] + "8": torch.ones(2)}), "weight8: no tensor"),
    "wrong shape": (lambda weights: weights.update({NATIVE: torch.ones(128, 127)}), r"has shape \(128, 127\)"),
    "wrong type": (lambda weights: weights.update({NATIVE: weights[NATIVE].double()}), "has type F64, must have F32"),
    "old and new name": (
        lambda weights: weights.update({"mtp.layers.0.transformer_layer.input_layernorm.weight": torch.ones(128)}),
        "given twice, by an old name and a new one",
    ),
    "not a number": (lambda weights: weights.update({NATIVE: weights[NATIVE] * float("nan")}), "holds an infinity or"),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_checkpoint_that_is_not_the_model_is_refused(damage: str, tmp_path: Path) -> None:
    change, message = CHECKPOINTS[damage]
    weights = native_weights(MODEL)
    change(weights)
    refused(str(native_run(tmp_path / "run", MODEL, weights)), tmp_path / "out", message, dtype="fp8")


def resealed(checkpoint: Path, folder: Path, change: Callable[[Path], object]) -> str:
    """A checkpoint that was changed and has a manifest that agrees: only its own numbers tell."""
    shutil.copytree(checkpoint / "checkpoints" / "step-00000007", folder)
    metadata = json.loads((folder / MANIFEST_NAME).read_text())["metadata"]
    (folder / MANIFEST_NAME).unlink()
    change(folder)
    write_manifest(folder, metadata)
    return str(folder)


def part(name: str, whole: tuple[int, int], offset: tuple[int, int], shape: tuple[int, int]) -> Damage:
    return lambda folder: write_parts(folder, "model", 2, [TensorPart(name, whole, offset, torch.ones(shape))])


def without_half_of_the_head(folder: Path) -> None:
    with WholeTensors(folder, "model") as tensors:
        parts = [TensorPart(name, tuple(t.shape), (0,) * t.dim(), t.clone()) for name, t in tensors.items()]
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    cut = [replace(p, tensor=p.tensor[:256]) if p.name == "output_layer.weight" else p for p in parts]
    write_parts(folder, "model", 0, cut)


RESEALED: dict[str, tuple[Damage, str]] = {
    "a rank's file is missing": (lambda folder: (folder / "model-00001.safetensors").unlink(), "missing"),
    "half of a tensor is missing": (without_half_of_the_head, "32768 of 65536 numbers are missing"),
    "numbers are there twice": (part("output_layer.weight", (512, 128), (8, 0), (9, 128)), "numbers are twice"),
    "part of another whole": (part("output_layer.weight", (7, 128), (0, 0), (7, 128)), r"shape \[7, 128\], elsewhere"),
}


@pytest.mark.parametrize("damage", RESEALED)
def test_parts_that_do_not_fit_together_are_refused(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    change, message = RESEALED[damage]
    refused(resealed(checkpoint, tmp_path / "step", change), tmp_path / "out", message)


def test_an_audit_notices(sound: Path, tmp_path: Path) -> None:
    audit = read_audit(sound)
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    put(EXPERT, first(0.5))(folder)
    with pytest.raises(DataError, match=f"{EXPERT}: blake3 is"):
        check_audit(audit, TensorFolder(folder))
    for change, message in (
        (lambda audit: audit["written"].pop(EXPERT), "do not match"),
        (lambda audit: audit["read"].pop("output_layer.weight"), "do not match"),
        (lambda audit: audit["read"][NATIVE].update(to=[]), "nothing holds its numbers"),
    ):
        damaged = read_audit(sound)
        change(damaged)
        with pytest.raises(DataError, match=message):
            check_audit(damaged, TensorFolder(sound))
    with pytest.raises(DataError, match=f"{NATIVE}: is missing"):
        check_audit(audit, TensorFolder(sound), {k: v for k, v in native_weights(MODEL).items() if k != NATIVE})
    (folder / "audit.json").write_text("{}")
    with pytest.raises(UserError, match="is no audit"):
        read_audit(folder)


def test_what_is_there_already_is_not_lost(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="name a new folder"):
        convert(checkpoint, run)
    assert (run / "hf" / "notes.txt").read_text() == "mine"
    earlier = convert(checkpoint, tmp_path / "other")
    before = hf_of(earlier)
    bad = native_weights(MODEL) | {NATIVE: torch.full((128, 128), float("nan"))}
    shutil.rmtree(checkpoint.parent / "bad", ignore_errors=True)
    with pytest.raises(DataError, match="numbers|infinity"):
        source = native_run(checkpoint.parent / "bad", MODEL, bad)
        (tmp_path / "other" / "config.yaml").unlink()
        convert(source, tmp_path / "other", dtype="fp8")
    assert hf_of(earlier).keys() == before.keys()
    assert len(native_of(checkpoint / "checkpoints" / "step-00000007")) == len(native_weights(MODEL))
