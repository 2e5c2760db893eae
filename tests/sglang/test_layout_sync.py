"""Weights of trainers in several layouts reach one real SGLang server whole, and are the same bits in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import run_to_the_end

LAYOUTS = {
    "one": (1, {}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-ep2": (4, {"tensor": 2, "expert": 2}),
}


@pytest.mark.sglang
@pytest.mark.dist
@pytest.mark.timeout(330)
def test_every_layout_fills_the_engine_alike(tmp_path):
    seen = {}
    for name, (ranks, degrees) in LAYOUTS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps({"parallel": degrees}))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run_to_the_end([*launcher, str(Path(__file__).with_name("ranks_sync.py")), str(folder)], seconds=110)
        seen[name] = json.loads((folder / "seen.json").read_text())
        gaps = seen[name]["gaps"]
        print(f"{name}: largest log-prob difference over {len(gaps)} versions {max(gaps):.1e}")
        assert len(gaps) == 11 and 0 < max(gaps) < 1e-4
    assert seen["pp2"]["checksums"] == seen["one"]["checksums"] == seen["tp2-ep2"]["checksums"]
    assert seen["one"]["checksums"][0] != seen["one"]["checksums"][1]
