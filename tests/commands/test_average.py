"""average: the mean against float64's, what starts from it, and what has no mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1.__main__ import exit_code
from megatron_r1.checkpoint.manifest import verify
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.runs.initial_weights import find_weights
from tests.support.conversions import convert, native_run, native_weights

RECIPE = load("pretrain")
MODEL = replace(RECIPE.model, num_layers=2)
WEIGHTS = {name: native_weights(MODEL, seed) for seed, name in enumerate("abc")}


def stored(folder: Path, name: str, model: ModelConfig, weights: dict[str, torch.Tensor]) -> Path:
    """A run with a tokenizer that has words."""
    run = native_run(folder / name, model, weights)
    checkpoint = run / "checkpoints" / "step-00000007"
    train_tokenizer(RECIPE.data).save(checkpoint / "tokenizer")
    (checkpoint / "manifest.json").unlink()
    from megatron_r1.checkpoint.manifest import write_manifest
    from megatron_r1.config.schema import resolved

    write_manifest(checkpoint, {"config": {"model": resolved(model)}, "layout": {}})
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, weights in WEIGHTS.items():
        stored(folder, name, MODEL, weights)
    return folder


def average(root: Path, name: str, models: dict[str, Path | str], *overrides: str) -> int:
    named = [f"average.models.{key}='{source}'" for key, source in models.items()]
    return exit_code(["average", f"root={root}", f"name={name}", *named, *overrides])


@pytest.mark.parametrize("weights", [{}, {"a": 3.0, "c": 0.5}])
def test_the_mean_is_that_of_float64_and_says_what_it_is_of(runs, tmp_path, weights):
    settings = [f"average.weights.{name}={weight}" for name, weight in weights.items()]
    assert average(tmp_path, "mean", {name: runs / name for name in WEIGHTS}, *settings) == 0
    found = find_weights(str(tmp_path / "mean"))
    shares = torch.tensor([weights.get(name, 1.0) for name in WEIGHTS], dtype=torch.float64)
    shares /= shares.sum()
    assert found.model == MODEL and found.tensors.keys() == WEIGHTS["a"].keys()
    assert any(name.endswith("expert_bias") for name in found.tensors)
    worst = 0.0
    for name, tensor in found.tensors.items():
        exact = sum(share * WEIGHTS[run][name].double() for run, share in zip(WEIGHTS, shares, strict=True))
        assert tensor.dtype == WEIGHTS["a"][name].dtype
        worst = max(worst, float((tensor.double() - exact).abs().max()))
    print(f"largest difference to float64's mean {worst:.1e}")
    assert worst < 1e-6
    verify(found.folder)
    note = json.loads((found.folder / "average.json").read_text())
    assert [note[name]["share"] for name in WEIGHTS] == pytest.approx(shares.tolist())
    assert all(note[name]["source"] == str(runs / name) and len(note[name]["manifest_sha256"]) == 64 for name in note)
    assert found.tokenizer().vocab_size == train_tokenizer(RECIPE.data).vocab_size


def test_folders_and_half_precision_are_averaged_in_fp32(runs, tmp_path):
    folder = convert(runs / "a", tmp_path / "folder", dtype="bf16")
    rounded = {name: tensor.bfloat16().float() for name, tensor in WEIGHTS["a"].items()}
    assert average(tmp_path, "mixed", {"b": runs / "b", "folder": f"hf:{folder}"}) == 0
    found = find_weights(str(tmp_path / "mixed"))
    assert found.model.dtype == "fp32"
    for name, tensor in found.tensors.items():
        other = WEIGHTS["a"] if name.endswith("expert_bias") or ".router." in name else rounded
        torch.testing.assert_close(tensor, (WEIGHTS["b"][name] + other[name]) / 2, rtol=1e-2, atol=1e-2)
    assert average(tmp_path, "half", {"folder": f"hf:{folder}", "b": runs / "b"}) == 0
    half = find_weights(str(tmp_path / "half"))
    assert half.model.dtype == "bf16" and half.tensors["output_layer.weight"].dtype == torch.bfloat16
    exact = (rounded["output_layer.weight"].double() + WEIGHTS["b"]["output_layer.weight"].double()) / 2
    assert torch.equal(half.tensors["output_layer.weight"], exact.float().bfloat16())


def test_models_that_have_no_mean_are_refused_in_a_line(runs, tmp_path, capsys):
    wider = replace(MODEL, num_layers=3)
    stored(tmp_path, "wider", wider, native_weights(wider))
    lacking = {name: tensor for name, tensor in WEIGHTS["a"].items() if name != "output_layer.weight"}
    stored(tmp_path, "lacking", MODEL, lacking)
    other_words = native_run(tmp_path / "other_words", MODEL, WEIGHTS["a"])
    for models, overrides, message in (
        ({"a": runs / "a"}, (), "average.models={'a': "),
        ({}, (), "average.models={}: must name two models at the least"),
        ({"a": runs / "a", "b": tmp_path / "missing"}, (), "must be a run with a checkpoint"),
        ({"a": runs / "a", "b": tmp_path / "wider"}, (), "model.num_layers=2: must be 3, as in "),
        ({"a": runs / "a", "b": tmp_path / "lacking"}, (), "output_layer.weight is in one of them alone"),
        ({"a": runs / "a", "b": other_words}, (), "its vocabulary is another"),
        ({"a": runs / "a", "b": runs / "b"}, ("average.weights.c=1",), "average.weights.c=1.0: must be of one of a, b"),
        ({"a": runs / "a", "b": runs / "b"}, ("average.weights.b=0",), "average.weights.b=0.0: must be above 0"),
    ):
        assert average(tmp_path, "refused", models, *overrides) in (2, 3)
        said = " ".join(capsys.readouterr().err.split())
        assert message in said, said
        assert not (tmp_path / "refused" / "checkpoints").exists()
