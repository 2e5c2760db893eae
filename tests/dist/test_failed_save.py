"""A rank that cannot write its part of a checkpoint: all ranks know, none waits for it, the next save works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fork_server import run_forked_to_the_end


@pytest.mark.dist
def test_a_rank_that_cannot_write_leaves_no_other_waiting(tmp_path):
    run_forked_to_the_end(Path(__file__).with_name("ranks_failed_save.py"), tmp_path, ranks=2, seconds=60)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert "cannot write" in found["1"] and found["1"].endswith("on rank 0") and found["2"] == "saved"
    assert [path.name for path in (tmp_path / "pretrain" / "checkpoints").glob("step-*")] == ["step-00000002"]
