"""A checkpoint of any layout goes on in any other: the same next loss, the same optimizer state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fork_server import run_forked_to_the_end

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "dp2": (2, {}),
    "etp2": (2, {"tensor": 2, "expert_tensor": 2}),
    "vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "uneven-pp2": (2, {"pipeline": 2, "pipeline_layers": [3, 1]}),
    "tp2-ep2": (4, {"tensor": 2, "expert": 2}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp4": (4, {}),
}


@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["dp2", "vpp2"], id="2 layouts"),
        pytest.param(list(LAYOUTS), id="all layouts", marks=pytest.mark.slow),
    ],
)
def test_every_layout_resumes_from_every_other(names, tmp_path):
    layouts: dict[int, dict] = {}
    for name in names:
        ranks, degrees = LAYOUTS[name]
        layouts.setdefault(ranks, {})[name] = degrees
    (tmp_path / "job.json").write_text(json.dumps({"layouts": layouts, "sources": names}))
    for action in ("save", "load"):
        for ranks in layouts:
            run_forked_to_the_end(
                Path(__file__).with_name("ranks_resharding.py"), tmp_path, action, ranks=ranks, seconds=400
            )
    saved = {name: json.loads((tmp_path / name / "save.json").read_text())["next_loss"] for name in names}
    worst = 0.0
    for name in names:
        for source, found in json.loads((tmp_path / name / "load.json").read_text()).items():
            assert found["equal"], f"{source} -> {name}: the optimizer's state is not what was saved"
            difference = abs(found["next_loss"] / saved[source] - 1)
            assert difference < 1e-6, f"{source} -> {name}: next loss differs by {difference:.1e}"
            worst = max(worst, difference)
    print(f"{len(names) ** 2} pairs: largest relative difference of the next loss {worst:.1e}")
