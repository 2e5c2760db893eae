"""Every layout computes what one rank computes: losses, gradients, a GRPO update."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_to_the_end

from megatron_r1.config.load import load, resolved

LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "dp2": (2, {}),
    "tp2-ep2": (4, {"tensor": 2, "expert": 2}),
    "etp2": (2, {"tensor": 2, "expert_tensor": 2}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp2-tp2": (4, {"tensor": 2}),
}
SHORT = ("tp2", "pp2", "ep2", "dp2", "tp2-ep2")
DENSE_LAYOUTS = ("tp2", "pp2", "dp2", "tp2-pp2")
DENSE_CHANGES = ("model.attention.qkv_bias=false", "model.attention.qk_norm=true", "model.tied_embeddings=true")
"""What needs more than one reduction: norms that heads of all ranks share, an embedding on two pipeline stages."""
TOLERANCE = 1e-6
SPLIT_SUM_TOLERANCE = 5e-6
"""Tensor parallelism adds fp32 partial sums of matrix products in another order; 1.5e-6 was seen."""


@dataclass(frozen=True)
class Numbers:
    """What one kind of training gave."""

    row: dict[str, Any]
    gradients: dict[str, torch.Tensor]


def numbers_of(ranks: int, degrees: dict[str, int], folder: Path, model: str = "tiny") -> dict[str, Numbers]:
    shape = resolved(load("pretrain", [f"model={model}", *DENSE_CHANGES] if model == "tiny_dense" else []).model)
    (folder / "job.json").write_text(json.dumps({"parallel": degrees, "model": shape}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run_to_the_end([*launcher, str(Path(__file__).with_name("ranks_layouts.py")), str(folder)], seconds=110)
    return {
        kind: Numbers(
            json.loads((folder / f"{kind}.json").read_text()),
            torch.load(folder / f"{kind}.pt", weights_only=True),
        )
        for kind in ("pretrain", "grpo")
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return numbers_of(1, {}, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def one_dense(tmp_path_factory):
    return numbers_of(1, {}, tmp_path_factory.mktemp("one-dense"), "tiny_dense")


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    return max((float((found[n] - expected[n]).norm() / (expected[n].norm() + 1e-30)), n) for n in expected)


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_layout_computes_what_one_rank_does(one, layout, tmp_path):
    ranks, degrees = LAYOUTS[layout]
    assert_same(layout, numbers_of(ranks, degrees, tmp_path), one)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_a_layout_of_a_dense_model_computes_what_one_rank_does(one_dense, layout, tmp_path):
    ranks, degrees = LAYOUTS[layout]
    assert_same(layout, numbers_of(ranks, degrees, tmp_path, "tiny_dense"), one_dense)


def assert_same(layout: str, here: dict[str, Numbers], one: dict[str, Numbers]) -> None:
    for kind in ("pretrain", "grpo"):
        difference, name = worst(here[kind].gradients, one[kind].gradients)
        print(f"{layout} {kind}: largest relative difference of a gradient {difference:.1e} ({name})")
        assert difference < (SPLIT_SUM_TOLERANCE if "tp2" in layout else TOLERANCE)
    found, expected = here["pretrain"].row, one["pretrain"].row
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    assert found["losses"][1:] == pytest.approx(expected["losses"][1:], rel=1e-4)
    assert here["grpo"].row == pytest.approx(one["grpo"].row, rel=1e-4, abs=1e-6)
