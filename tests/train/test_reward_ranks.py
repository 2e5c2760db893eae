"""A reward model on two ranks computes what it computes on one: scores, losses, gradients, the head's included."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import run_to_the_end

SUPPORT = Path(__file__).parents[1] / "support"
TOLERANCE = 5e-6
"""In fp32 the parts of a sum that lie on several ranks are added in another order."""


@pytest.fixture(scope="module")
def two_ranks_found(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_to_the_end([*launcher, str(SUPPORT / "ranks_reward.py"), str(folder)], seconds=100)
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("objective", ["pairwise", "pointwise"])
def test_layouts_compute_the_same(two_ranks_found, one_rank, objective, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT.parent / "dist"))
    from reward_cases import one_update

    from megatron_r1.config.parallel import ParallelConfig

    metrics, gradients, scores = one_update(one_rank, ParallelConfig(), objective == "pairwise", 0.5)
    assert any(gradients["reward_head.weight"].flatten() != 0)
    for layout in ("tp2", "pp2" if objective == "pairwise" else "dp2"):
        found = json.loads((two_ranks_found / f"{layout}-{objective}.json").read_text())
        assert found["scores"] == pytest.approx(scores, rel=1e-5, abs=1e-6), layout
        assert found["metrics"] == pytest.approx(metrics, rel=1e-5), layout
        theirs = torch.load(two_ranks_found / f"{layout}-{objective}.pt", weights_only=True)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            distance = (theirs[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            assert distance < TOLERANCE, f"{layout} {name}: {distance:.1e}"
