"""A reward model on two ranks computes what it computes on one: scores, losses, gradients, the head's included."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.support.launching import run_to_the_end

SUPPORT = Path(__file__).parents[1] / "support"
TOLERANCE = 5e-6
"""In fp32 the parts of a sum that lie on several ranks are added in another order."""
LAYOUTS = ("tp2", "pp2", "dp2", "ep2")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_compute_what_one_does(layout, one_rank, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SUPPORT.parent / "dist"))
    from megatron_r1.config.parallel import ParallelConfig
    from tests.support.reward_cases import one_update

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_to_the_end([*launcher, str(SUPPORT / "ranks_reward.py"), str(tmp_path), layout], seconds=100)
    for objective in ("pairwise", "pointwise"):
        metrics, gradients, scores = one_update(one_rank, ParallelConfig(), objective == "pairwise", 0.5)
        assert any(gradients["reward_head.weight"].flatten() != 0)
        found = json.loads((tmp_path / f"{objective}.json").read_text())
        assert found["scores"] == pytest.approx(scores, rel=1e-5, abs=5e-6)
        assert found["metrics"] == pytest.approx(metrics, rel=1e-5)
        theirs = torch.load(tmp_path / f"{objective}.pt", weights_only=True)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            distance = (theirs[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            assert distance < TOLERANCE, f"{objective} {name}: {distance:.1e}"
