"""Transformer Engine on a GPU against this project's torch parts there: gradients, FP8, speed and memory."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from tests.support.gpus import REHEARSAL, needs_gpus, run_program
from tests.support.gradients import largest

pytestmark = [*needs_gpus(), pytest.mark.timeout(900)]
BF16 = 0.05
"""Largest relative difference of a gradient that rounding to bf16 explains; weights a tenth away give far more."""


def difference(one, two) -> float:
    """The largest relative difference of a parameter's gradient."""
    with safe_open(one, "pt") as ours, safe_open(two, "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        return largest(
            float((ours.get_tensor(name) - (other := theirs.get_tensor(name))).norm() / (other.norm() + 1e-12))
            for name in ours.keys()  # noqa: SIM118
        )


@pytest.mark.parametrize("shape", ["small", pytest.param("wide", marks=pytest.mark.skipif(REHEARSAL, reason="large"))])
def test_gradients_are_those_of_the_torch_parts(tmp_path, record_property, shape):
    for parts, moved in (("te", 0), ("torch", 0), ("torch", 0.1)):
        run_program("gradients.py", parts, shape, moved, tmp_path / f"{parts}-{moved}.safetensors")
    same = difference(tmp_path / "te-0.safetensors", tmp_path / "torch-0.safetensors")
    moved = difference(tmp_path / "torch-0.1.safetensors", tmp_path / "torch-0.safetensors")
    record_property("difference", f"{same:.1e}, of moved weights {moved:.1e}")
    assert same < BF16 < moved / 3


def test_fp8_products_are_those_of_the_exact_arithmetic(tmp_path, record_property):
    """What the kernel differs by is its order of addition and bf16; what FP8 itself rounds is far more."""
    run_program("fp8_product.py", file := tmp_path / "found.json")
    found = json.loads(file.read_text())
    record_property("differences", found)
    for name, kernel in found["kernel"].items():
        assert kernel < found["plain"][name] / 4, name


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_updates_at_full_width_learn_within_the_memory(tmp_path, record_property, precision):
    layers, steps = (2, 3) if REHEARSAL else (3, 20)
    run_program("speed.py", precision, layers, steps, file := tmp_path / "found.json")
    found = json.loads(file.read_text())
    record_property("found", {name: found[name] for name in ("tokens_per_second", "memory_gib", "parameters")})
    assert found["losses"][-1] < found["losses"][0] - (0 if REHEARSAL else 0.5)
