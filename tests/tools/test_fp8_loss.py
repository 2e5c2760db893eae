"""The FP8 benchmark in short: a few real steps, a broken scale, finished runs not repeated, table and figure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_r1.model.fp8 import quantise

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fp8_loss", ROOT / "tools/bench/fp8_loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8-loss")
    return bench.parsed([f"--steps={STEPS}", "--batch=4", "--documents=500", "--seeds=0", f"--folder={folder}"])


@pytest.fixture(scope="module")
def runs(bench, options, one_rank):
    """Variant -> a real run of it."""
    return {variant: bench.train(variant, 0, options, one_rank) for variant in bench.VARIANTS}


def error(bench, run, baseline) -> float:
    return max(abs(mine / theirs - 1) for mine, theirs in zip(run["losses"], baseline["losses"], strict=True))


def test_fp8_is_near_bf16_and_something_else(bench, runs):
    baseline = runs[bench.BASELINE]
    assert 5e6 < baseline["parameters"] < 10e6
    assert baseline["losses"][-1] < 0.9 * baseline["losses"][0]
    losses = [tuple(run["losses"]) for run in runs.values()]
    assert len(set(losses)) == len(losses)
    for run in runs.values():
        assert 0 <= error(bench, run, baseline) < 0.01


def test_a_scale_of_the_neighbouring_tile_is_seen_in_the_loss(bench, runs, options, one_rank, monkeypatch):
    proper = quantise.quantise

    def shifted(*arguments):
        found = proper(*arguments)
        return found._replace(scales_mn=found.scales_mn.roll(1, 0))

    monkeypatch.setattr(quantise, "quantise", shifted)
    broken = bench.train("fp8, as the report", 0, options, one_rank)
    assert error(bench, broken, runs[bench.BASELINE]) > 0.01


def test_finished_runs_are_read_and_reported(bench, runs, options, capsys):
    for variant, run in runs.items():
        bench.save(options, variant, 0, run)
    # Were one not found, it would start a process, which knows no such data.
    bench.main([f"--steps={STEPS}", "--batch=4", "--documents=-1", "--seeds", "0", f"--folder={options.folder}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == list(bench.VARIANTS)
    assert lines[1].count("0.000%") == 3
    found = json.loads((options.folder / "fp8_loss.json").read_text())
    assert found["errors"][bench.BASELINE] == [{"size": 0.0, "signed": 0.0}]
    assert found["tokens_per_step"] == 256 and len(found["final_losses"]) == 5
    assert "<svg" in (options.folder / "fp8_loss.svg").read_text()


def test_smoothing_and_error_are_those_of_the_report(bench):
    assert bench.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert bench.smoothed([1.0, 2.0]) == pytest.approx([1.0, (0.09 + 0.2) / 0.19])
    baseline, run = {"losses": [2.0] * 4}, {"losses": [2.0, 2.0, 2.01, 1.99]}
    late = bench.error_of(run, baseline)
    first, second = (value / 2 - 1 for value in bench.smoothed(run["losses"])[2:])
    assert late == {
        "size": pytest.approx((abs(first) + abs(second)) / 2),
        "signed": pytest.approx((first + second) / 2),
    }


def test_one_unit_in_the_last_place_is_that(bench):
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    bench.move_one_unit(model)
    weight, bias = model.weight.detach(), model.bias.detach()
    moved = weight.view(torch.int16).int() - before[0].view(torch.int16).int()
    assert moved.abs().sum() == 1 and abs(int(moved[0, 0])) == 1 and torch.equal(bias, before[1])
