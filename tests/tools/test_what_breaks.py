"""The page of what breaks first at 100,000 GPUs: what it computes, by hand and by simulation, and that it holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "plan" / "what_breaks.py"
sys.path.insert(0, str(PROGRAM.parent))


def test_a_cause_breaks_where_it_first_takes_a_tenth():
    from what_breaks import first_broken

    plans = [SimpleNamespace(gpus=gpus) for gpus in (8, 16, 32)]
    assert first_broken(plans, lambda plan: plan.gpus / 200) == 32
    assert first_broken(plans, lambda plan: 0.05) is None


def test_growth_is_a_power():
    from what_breaks import exponent

    assert exponent({10: 3.0, 20: 99.0, 40: 48.0}) == pytest.approx(2)


def test_the_page_is_what_the_planner_still_says():
    """Within a quarter: constants may be fitted again without a new page."""
    from what_breaks import FIGURE, OWN_SIZES, PAGE, SIZES, grown

    written = PAGE.read_text(encoding="utf-8")
    row = next(line for line in written.splitlines() if line.startswith(f"| {SIZES[-1]:,} | TP"))
    cells = [float(re.match(r"[\d.]+", cell.strip().replace(",", ""))[0]) for cell in row.split("|")[3:-1]]
    plan = grown(SIZES[-1])
    expected = [plan.best.seconds, plan.tokens_per_gpu(), *(100 * plan.share(name) for name in ("exchange", "bubble"))]
    assert cells[:4] == pytest.approx(expected, rel=0.25, abs=3)
    assert cells[5:] == pytest.approx(
        [plan.between_failures / 60, 100 * plan.lost(background=False), 100 * plan.lost(background=True)],
        rel=0.1,
        abs=1,
    )
    assert f"]({FIGURE.name})" in written and f">{OWN_SIZES[-1]:,}<" in FIGURE.read_text(encoding="utf-8")
