"""Two bad batches: the run goes back before their spike and skips them, bitwise as a run that never had them, also when
ranks are killed in the spike and after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_r1.errors import ExitCode
from tests.support.launching import run_to_the_end
from tests.support.spiky_runs import BAD, SPIKE, STEPS


@pytest.mark.dist
@pytest.mark.timeout(240)
def test_a_run_goes_back_before_a_spike(tmp_path: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.spiky_runs", str(tmp_path)]
    run_to_the_end(program, seconds=200)
    found = json.loads((tmp_path / "found.json").read_text())
    killed, without = found["killed"], found["without"]
    assert without["attempts"] == [[0, 0]], without["log"]
    assert killed["attempts"] == [[-9, -9], [ExitCode.REQUEUE] * 2, [-9, -9], [0, 0]], killed["log"]
    said = f"the spike from step {SPIKE} to {SPIKE + 1} is confirmed: the same command goes back"
    assert killed["log"].count(said) == 1
    (rewind,) = found["rewinds"]
    assert (rewind["skip_from"], rewind["skip_to"], rewind["last_step"]) == (BAD.start, BAD.stop, SPIKE + 1)
    assert rewind["values"]["train/loss"] > 2 * without["rows"][SPIKE]["train/loss"]
    assert [row["step"] for row in killed["rows"]] == [*range(1, STEPS + 1)]
    assert killed["rows"] == without["rows"]
    assert killed["saved"] == without["saved"] != {}
    rewinds = {row["step"]: row["train/rewinds"] for row in killed["rows"]}
    assert (rewinds[SPIKE - 1], rewinds[SPIKE], rewinds[STEPS]) == (0, 1, 1)
