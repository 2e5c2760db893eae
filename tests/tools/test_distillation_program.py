"""The experiment on distillation, in short: every method has a row at every measurement, from the same start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = (
    "--seeds=0", "--updates=2", "--responses=3", "--eval-prompts=2", "--eval-interval=1", "--teacher-steps=3",
    "--student-steps=2", "--documents=300", "--rates=1e-3",
)  # fmt: skip


@pytest.mark.timeout(120)
def test_every_method_is_measured_from_the_same_start(tmp_path):
    program = ROOT / "tools" / "bench" / "on_policy_distillation.py"
    command = [sys.executable, program, *SHORT, f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110, check=True)
    header, _, *rows = done.stdout.splitlines()
    assert [re.split(", rate", cell)[0].strip() for cell in header.split("|")[3:-1]] == [
        "on-policy", "on-policy x4", "sampled", "off-policy", "SFT", "SFT x4",
    ]  # fmt: skip
    for measure in ("reverse", "forward", "forward_on_teacher"):
        found = [row.split("|")[3:-1] for row in rows if row.startswith(f"| {measure} |")]
        assert len(found) == 3
        values = [[float(cell.split()[0]) for cell in cells] for cells in found]
        assert len(set(values[0])) == 1 and values[0][0] > 0, "all methods start from one student"
        assert values[2][0] < values[0][0], "the divergence to the teacher falls"
        assert [cell.split()[-2] for cell in found[0]] == ["0"] * 6 and "0" not in [c.split()[-2] for c in found[2]]
