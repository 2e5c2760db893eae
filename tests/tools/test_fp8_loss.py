"""The FP8 benchmark in short: a few real steps, a broken scale, finished runs not repeated, table and figure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_r1.model.fp8 import quantise
from tests.support.gradients import largest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
LARGEST_ERROR = 0.025
"""Of a loss after up to three steps: proper scales give 0.011 at the most, those of a neighbouring tile 0.062."""


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
    return bench.parsed(
        [f"--steps={STEPS}", "--batch=4", "--documents=300", "--probes=1", "--seeds=0", f"--folder={folder}"]
    )


@pytest.fixture(scope="module")
def runs(bench, options, one_rank):
    """Variant -> a real run of it."""
    return {variant: bench.train(variant, 0, options, one_rank)[0] for variant in bench.VARIANTS}


@pytest.fixture(scope="module")
def same_weights(bench, options, one_rank):
    """Variant -> errors at the baseline's last weights."""
    return bench.at_the_same_weights(0, options, one_rank)


def error(bench, run, baseline) -> float:
    return largest(abs(mine / theirs - 1) for mine, theirs in zip(run["losses"], baseline["losses"], strict=True))


def test_fp8_is_near_bf16_and_something_else(bench, runs):
    baseline = runs[bench.BASELINE]
    assert 5e6 < baseline["parameters"] < 10e6
    assert baseline["losses"][-1] < 0.95 * baseline["losses"][0]
    losses = [tuple(run["losses"]) for run in runs.values()]
    assert len(set(losses)) == len(losses)
    for run in runs.values():
        assert 0 <= error(bench, run, baseline) < LARGEST_ERROR


def test_a_scale_of_the_neighbouring_tile_shows_in_the_loss(bench, runs, options, one_rank, monkeypatch):
    proper = quantise.quantise

    def shifted(*arguments):
        found = proper(*arguments)
        return found._replace(scales_mn=found.scales_mn.roll(1, 0))

    monkeypatch.setattr(quantise, "quantise", shifted)
    broken, _, _ = bench.train("fp8, as the report", 0, options, one_rank)
    assert error(bench, broken, runs[bench.BASELINE]) > LARGEST_ERROR


def test_at_the_same_weights_fp8_errs_more_than_bf16_and_little(bench, same_weights):
    errors = {variant: error["gradient"] for variant, error in same_weights.items()}
    bf16 = errors.pop(bench.BASELINE)
    assert len(set(errors.values())) == 3
    assert all(0 < 3 * bf16 < error < 0.5 for error in errors.values())
    assert all(0 < abs(error["loss"]) < 0.01 for error in same_weights.values())


def test_finished_runs_are_read_and_reported(bench, runs, same_weights, options, capsys):
    for kind, run in (runs | {bench.SAME_WEIGHTS: same_weights}).items():
        bench.save(options, kind, 0, run)
    # Were one not found, it would start a process, which knows no such data.
    bench.main([f"--steps={STEPS}", "--batch=4", "--documents=-1", "--seeds", "0", f"--folder={options.folder}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == list(bench.VARIANTS)
    assert len(lines) == 12 and lines[8].startswith("bf16 ")
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
