"""Every training verb on Transformer Engine: the losses of torch's parts, and resumed half way to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.checkpoint.store import newest_verified
from megatron_r1.track.metrics import reproducible
from megatron_r1.track.record import read_metrics
from tests.support.fork_server import run_forked_to_the_end
from tests.transformer_engine.on_cpu import needs_transformer_engine, run_with_transformer_engine
from tests.transformer_engine.verbs import STEPS, VERBS

PROGRAM = Path(__file__).with_name("verbs.py")
SIX_DIGITS = 5e-6
"""Half a unit of the sixth digit at worst, of the verb's largest loss: 3.0e-6 was found. A loss of grpo, a sum of
advantages of both signs, may be near 0."""
pytestmark = [needs_transformer_engine, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def with_te(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with-te")
    run_with_transformer_engine(PROGRAM, folder, seconds=230)
    return folder


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with-torch")
    run_forked_to_the_end(PROGRAM, folder, seconds=230)
    return folder


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    return [reproducible(row) for row in read_metrics(folder / run / "metrics.jsonl")]


def losses(folder: Path, verb: str) -> list[float]:
    if verb == "grpo":
        return [row["policy/loss"] for row in json.loads((folder / "grpo.json").read_text())]
    return [row["train/loss"] for row in rows(folder, verb)]


@pytest.mark.parametrize("verb", VERBS)
def test_losses_are_those_of_torch_parts(with_te, with_torch, verb):
    found, expected = losses(with_te, verb), losses(with_torch, verb)
    largest = max(map(abs, expected))
    print(verb, max(abs(a - b) for a, b in zip(found, expected, strict=True)) / largest, found)
    assert len(found) == STEPS and len(set(found)) > STEPS / 2
    assert found == pytest.approx(expected, rel=0, abs=SIX_DIGITS * largest)


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_a_signal_stops_resumes_as_if_undisturbed(with_te, verb):
    assert rows(with_te, f"{verb}-stopped") == rows(with_te, verb)
    stopped, whole = (newest_verified(with_te / run / "checkpoints")[0] for run in (f"{verb}-stopped", verb))
    names = sorted(path.name for path in whole.glob("[!r]*.safetensors"))
    assert {"model-00000.safetensors", "exp_avg-00000.safetensors", "exp_avg_sq-00000.safetensors"} <= {*names}
    for name in names:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
