"""The page of what breaks first at 100,000 GPUs: what it computes, by hand and by simulation, and that it holds."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "plan" / "what_breaks.py"
sys.path.insert(0, str(PROGRAM.parent))


def test_rare_failures_cost_what_young_found():
    """sqrt(2 saving / between failures), where that is small (Young 1974)."""
    from what_breaks import least_lost

    assert least_lost(10.0, 1e6, 0.0, 1.0) == pytest.approx((2 * 10 / 1e6) ** 0.5, rel=0.01)
    assert least_lost(0.0, 1e6, 100.0, 1e3) == pytest.approx(100 / 1e6 + 1e3 / 2e6, rel=0.01)


def test_frequent_failures_cost_what_they_do_in_a_simulation():
    """Work of 600 s between saves of 200 s, with a failure every 1,800 s and restarts of 300 s, which fail too."""
    from what_breaks import least_lost

    drawn, done, spent = random.Random(0), 0, 0.0
    next_failure = drawn.expovariate(1 / 1800)
    restarting = False
    while done < 20_000:
        needed = 600.0 + 200.0 + (300.0 if restarting else 0.0)
        if needed <= next_failure:
            spent, next_failure, done, restarting = spent + needed, next_failure - needed, done + 1, False
        else:
            spent, next_failure, restarting = spent + next_failure, drawn.expovariate(1 / 1800), True
    at_600 = 1 - done * 600.0 / spent
    least = least_lost(200.0, 1800.0, 300.0, 60.0)
    assert 0.9 * at_600 < least < 1.01 * at_600


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
