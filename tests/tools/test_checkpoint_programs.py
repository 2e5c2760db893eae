"""The programs that look at checkpoints say what is there, and notice what is not as it should be."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from megatron_r1.checkpoint.sharded import TensorPart, write_parts
from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.checkpoint.tensors import write_state, write_tensors
from megatron_r1.errors import ExitCode
from megatron_r1.hf.audit import described

TOOLS = Path(__file__).resolve().parents[2] / "tools"
WHOLE = torch.arange(24.0).reshape(4, 6)
ODD = torch.tensor([1.0, float("nan"), -3.0, float("inf")])


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a program; its exit status, and what it printed."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = program(name).main()
        return code, *capsys.readouterr()

    return run


def write(cuts: list[slice], moved: float = 0.0) -> Callable[[Path], dict]:
    """A checkpoint of as many ranks as there are cuts."""

    def files(folder: Path) -> dict:
        write_state(folder, {"step": 7})
        records = {}
        for rank, rows in enumerate(cuts):
            parts = [TensorPart("decoder.weight", (4, 6), (rows.start, 0), WHOLE[rows] + moved)]
            parts += [TensorPart("decoder.odd", (4,), (0,), ODD)] if rank == 0 else []
            records |= write_parts(folder, "model", rank, parts)
            moment = TensorPart("decoder.weight", (4, 6), (rows.start, 0), WHOLE[rows])
            records |= write_parts(folder, "exp_avg", rank, [moment])
            records |= write_tensors(folder, "random", rank, [("cpu", torch.arange(5, dtype=torch.uint8))])
        return records

    return files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of one and two ranks that hold the same numbers, and one that does not."""
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        store.commit(5, write([slice(0, 4)], moved=0.5), {"layout": {"ranks": 1}})
        store.commit(6, write([slice(0, 4)]), {"layout": {"ranks": 1}})
        store.commit(7, write([slice(0, 1), slice(1, 4)]), {"layout": {"ranks": 2, "tensor": 2}})
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def test_verify_reads_every_checkpoint_of_a_run(run, call):
    code, out, _ = call("verify_checkpoint", run)
    found = [f": step {number}, " in line for number, line in zip((7, 6, 5), out.splitlines(), strict=True)]
    assert code == 0 and all(found)


def test_verify_names_the_damaged_file_and_reads_on(run, call):
    path = step(run, 7) / "model-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    code, out, _ = call("verify_checkpoint", step(run, 7), step(run, 6))
    assert code == ExitCode.CHECKPOINT_DAMAGED
    first, second = out.splitlines()
    assert first.startswith("damaged: ") and "model-00001.safetensors has digest" in first
    assert "step 6" in second


@pytest.mark.parametrize("name", ["verify_checkpoint", "inspect_checkpoint"])
def test_what_is_no_checkpoint_is_refused_in_one_line(name, tmp_path, call):
    code, _, err = call(name, tmp_path)
    assert code == ExitCode.BAD_DATA and err.splitlines() == [
        f"{name}: {tmp_path}: is neither a run with checkpoints nor a checkpoint"
    ]


def test_inspect_counts_what_is_there(run, call):
    code, out, _ = call("inspect_checkpoint", run)
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert code == 0
    assert lines["model"] == ["2", "28", "112", "F32", "3"] and lines["exp_avg"] == ["1", "24", "96", "F32", "2"]
    assert lines["step"] == ["7"] and "random" not in lines and "'tensor': 2" in out


def test_inspect_lists_tensors_with_their_values(run, call):
    _, out, _ = call("inspect_checkpoint", step(run, 7), "--tensors", "*.odd", "--values")
    rms = f"{(10 / 2) ** 0.5:.4g}"
    assert out.splitlines()[-1].split() == ["decoder.odd", "model", "4", "F32", "1", "-3", "1", rms, "2"]


def test_inspect_compares_to_the_last_bit_whatever_the_layout(run, call):
    code, out, _ = call("inspect_checkpoint", step(run, 7), "--against", step(run, 6))
    assert code == 0 and "equal to the last bit" in out
    code, out, _ = call("inspect_checkpoint", step(run, 7), "--against", step(run, 5))
    assert code == 1
    assert out.splitlines()[-1].split(None, 2)[:2] == ["decoder.weight", "model"] and "at most 0.5" in out


def test_inspect_lists_what_only_one_has(run, call, tmp_path):
    other = Path(shutil.copytree(step(run, 6), tmp_path / "other"))
    (other / "exp_avg-00000.safetensors").unlink()
    write_parts(other, "model", 1, [TensorPart("extra", (2,), (0,), torch.zeros(2))])
    code, out, _ = call("inspect_checkpoint", step(run, 6), "--against", other)
    assert code == 1 and out.count("only in") == 2 and f"only in {other}" in out


def test_a_converted_folder_is_held_against_its_audit(tmp_path, call):
    folder, written = tmp_path / "hf", {"a.weight": WHOLE, "b.weight": ODD}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(written, folder / "model.safetensors")
    audit = {"written": {name: described(tensor) | {"file": "model.safetensors"} for name, tensor in written.items()}}
    audit["read"] = {name: described(tensor) | {"to": [name]} for name, tensor in written.items()}
    (folder / "audit.json").write_text(json.dumps(audit))
    code, out, _ = call("verify_checkpoint", folder)
    assert code == 0 and "2 tensors are as audit.json says" in out
    save_file(written | {"a.weight": WHOLE + 1}, folder / "model.safetensors")
    code, out, _ = call("verify_checkpoint", folder)
    assert code == ExitCode.CHECKPOINT_DAMAGED and "damaged: a.weight: blake3 is" in out
