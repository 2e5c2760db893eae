"""The benchmarks of conversion in short: a layer of a few small experts there and back, and what a difference is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_r1.config.load import load
from tests.support.conversions import in_precision

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/bench/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_layer_of_few_experts_comes_back_bitwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = program("convert_layer")
    size = ["--experts=4", "--hidden=448", "--heads=4", "--width=320", "--workers=1", "--shard-gb=0.002"]
    options = [*size, f"--folder={tmp_path / 'layer'}"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert bench.main(options) == 0
    output = capsys.readouterr().out
    assert "49 tensors and 3 files bitwise the same" in output and "GB/s" in output
    assert not (tmp_path / "layer").exists()


def test_a_difference_is_found() -> None:
    bench = program("convert_layer")
    first = {"files": {"a": {"blake3": "1"}}, "written": {"x": {"blake3": "2"}, "y": {"blake3": "3"}}}
    assert bench.differences(first, first) == []
    last = {"files": {"a": {"blake3": "1"}}, "written": {"x": {"blake3": "4"}}}
    assert bench.differences(first, last) == ["written: x", "written: y"]


def test_conversions_beside_cp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = program("convert_speed")
    tiny = in_precision(load("convert", ["model.num_layers=2"]).model, "bf16")
    monkeypatch.setattr(bench, "shape", lambda layers: tiny)
    monkeypatch.setattr(bench, "REST_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["convert_speed", "--rounds=2", f"--folder={tmp_path / 'speed'}"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("export", "import"))] == [case.title for case in bench.CASES]
    assert sum("times the speed of cp, sync" in line for line in lines) == 8 and not (tmp_path / "speed").exists()
