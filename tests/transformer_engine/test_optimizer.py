"""The optimizer's state between Transformer Engine and torch, and between numbers of ranks; see test_fp8.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks_resharding import load, save
from tests.transformer_engine.on_cpu import needs_transformer_engine, run_with_transformer_engine

pytestmark = needs_transformer_engine
HERE = Path(__file__).parent


@pytest.mark.dist
@pytest.mark.timeout(320)
def test_checkpoints_go_from_one_rank_of_torch_to_two_of_transformer_engine_and_back(
    one_rank: Any, tmp_path: Path
) -> None:
    from megatron_r1.config.run import RunConfig

    one, two = (tmp_path / name for name in ("one", "dp2"))
    one.mkdir()
    two.mkdir()
    expected = {"one": save(RunConfig(), one_rank, one)["next_loss"]}
    run_with_transformer_engine(HERE / "ranks_resharding.py", two, "one", ranks=2, seconds=300)
    of_two = json.loads((two / "found.json").read_text())
    expected["dp2"] = of_two["saved"]["next_loss"]
    found = [of_two["loaded"], load(RunConfig(), one_rank, tmp_path, ["dp2"])]
    for source, resumed in (pair for each in found for pair in each.items()):
        assert resumed["equal"], f"from {source}: the optimizer's state is not what was saved"
        assert resumed["next_loss"] == pytest.approx(expected[source], rel=1e-6), source
    assert expected["dp2"] == pytest.approx(expected["one"], rel=1e-6)
