"""convert as a person calls it, and training from what it wrote."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_r1.__main__ import exit_code
from megatron_r1.config.load import load
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.runs.initial_weights import find_weights
from tests.support.conversions import convert, hf_of, in_precision, native_run, native_weights, same_bits
from tests.support.fork_server import run_forked_to_the_end

RECIPE = load("pretrain")
MODEL = replace(RECIPE.model, num_layers=2, dtype="bf16")
LOST = "model.layers.1.mlp.experts.5.up_proj.weight"
SHORT = [
    *("model.num_layers=2", "model.dtype=bf16", "train.steps=2", "train.schedule.warmup_steps=1"),
    *("data.num_documents=300", "track=off", "platform=cpu", "threads=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 folder with a real tokenizer, its scales in other files than their weights."""
    base = tmp_path_factory.mktemp("fp8")
    weights = native_weights(MODEL)
    weights["output_layer.weight"] *= 8  # surer of itself, and wrong, than any new model
    source = native_run(base / "run", MODEL, weights)
    made = convert(source, base / "converted", dtype="fp8")
    train_tokenizer(RECIPE.data).save(made)
    stored = load_file(made / "model.safetensors")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("_scale_inv")}
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(scales, made / names[0], {"format": "pt"})
    save_file({name: tensor for name, tensor in stored.items() if name not in scales}, made / names[1])
    (made / "model.safetensors").unlink()
    weight_map = {name: names[name not in scales] for name in stored}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return made


def megatron_r1(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_r1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.timeout(300)
def test_training_starts_from_an_fp8_folder_as_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    native = convert(f"hf:{folder}", tmp_path / "native", to="native")
    assert same_bits(dict(find_weights(f"hf:{folder}").tensors), dict(find_weights(str(tmp_path / "native")).tensors))
    assert same_bits(hf_of(convert(native, tmp_path / "again", dtype="fp8")), hf_of(folder))
    run_forked_to_the_end(
        "megatron_r1", "pretrain", f"init.from='hf:{folder}'", f"root='{tmp_path}'", "name=trained", *SHORT
    )
    rows = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["train/loss"] > 1.5 * math.log(MODEL.vocab_size)  # a new model guesses


def lose_an_expert(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        stored = load_file(path)
        if LOST in stored:
            stored.pop(LOST)
            save_file(stored, path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop(LOST)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_off(folder: Path) -> None:
    path = next(iter(folder.glob("*.safetensors")))
    path.write_bytes(path.read_bytes()[:-100])


def test_converting_needs_no_megatron_core() -> None:
    """Its import takes seconds and says what it does not find on this machine."""
    code = "import sys, megatron_r1.commands.convert; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("damage", "message"), [(lose_an_expert, f"{LOST}: missing"), (cut_off, "cannot be read")], ids=["lost", "cut"]
)
def test_damage_is_one_line_and_leaves_nothing(damage, message: str, folder: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", folder, tmp_path / "hf"], check=True)
    damage(tmp_path / "hf")
    runs = tmp_path / "runs"
    done = megatron_r1("convert", f"init.from='hf:{tmp_path / 'hf'}'", "convert.to=native", f"root='{runs}'")
    assert done.returncode == 3 and not runs.exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("megatron-r1: ") and message in line


def test_a_dry_run_reads_headers_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", f"root='{tmp_path / 'runs'}'", "convert.dry_run=true", "convert.dtype=bf16"]
    assert exit_code([*arguments, f"init.from='hf:{folder}'"]) == 0
    output = capsys.readouterr()
    assert "bytes in BF16" in output.err and "F8_E4M3" not in output.err and not output.out
    subprocess.run(["cp", "-r", folder, tmp_path / "hf"], check=True)
    lose_an_expert(tmp_path / "hf")
    assert exit_code([*arguments, f"init.from='hf:{tmp_path / 'hf'}'"]) == 3
    output = capsys.readouterr()
    assert output.err.count(f"{LOST}: missing") == 2 and not (tmp_path / "runs").exists()
    # A checkpoint whose numbers are damaged still has headers; only a conversion holds it against its manifest.
    source = native_run(tmp_path / "native", in_precision(MODEL, "bf16"), native_weights(MODEL))
    weights = source / "checkpoints" / "step-00000007" / "model-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert exit_code([*arguments, f"init.from='{source}'"]) == 0
    assert exit_code([*arguments[:2], f"init.from='{source}'"]) == 88
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "init.from="),
        (["init.from=nowhere"], "init.from=nowhere: must be a run"),
        (["init.from=hf:nowhere"], "init.from=hf:nowhere: must be a folder with a config.json"),
        (["convert.dtype=fp16"], "convert.dtype=fp16: must be one of"),
        (["convert.to=native", "convert.dtype=fp8"], "convert.dtype=fp8: must be fp32"),
        (["convert.max_shard_gb=0"], "convert.max_shard_gb=0.0: must be above 0"),
        (["convert.workers=0"], "convert.workers=0: must be at least 1"),
    ],
)
def test_conversions_that_are_impossible_are_refused(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["convert", *overrides]) == 2
    assert message in capsys.readouterr().err
