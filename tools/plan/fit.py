"""Fits the time model's constants to published steps: tools/plan/fit.py [--leave-one-out [--write]].

The fit takes the closed formulas of the pipeline's bubble, the table the simulated schedules. Prints each row with what
the model predicts; --write keeps the table in megatron_r1/plan/README.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
from numpy.typing import NDArray
from readme import keep_table
from scipy.optimize import least_squares

from megatron_r1.plan.constants import Constants
from megatron_r1.plan.pipeline_time import simulated_step
from megatron_r1.plan.published import ROWS, PublishedStep
from megatron_r1.plan.step import Counted, count, step_time

LOW = (0.3, 0.3, 0.2, 0.2, 1e-6, 1.0)
HIGH = (0.95, 0.95, 1.0, 1.0, 2e-4, 2.0)
"""Bounds of the constants that are fitted: the first six."""
BEGIN, END = "<!-- rows: tools/plan/fit.py --leave-one-out --write -->\n", "<!-- end of rows -->"
SPREAD = 0.15
"""Relative error from which on a row counts less than by its square."""


def fitted(rows: Sequence[PublishedStep], counted: Sequence[Counted], start: Constants) -> Constants:
    """Constants of the smallest sum of squared logarithmic errors, of which large ones count less."""

    def errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = Constants(*map(float, values))
        times = [step_time(one, constants).total for one in counted]
        found: NDArray[np.float64] = np.log(np.array(times) / np.array([row.seconds for row in rows]))
        return found

    first = np.clip(np.array(astuple(start)[: len(LOW)]), LOW, HIGH)
    found = least_squares(errors, first, bounds=(LOW, HIGH), x_scale=first, loss="soft_l1", f_scale=SPREAD)
    return Constants(*map(float, found.x))


def error(row: PublishedStep, counted: Counted, constants: Constants) -> float:
    """Relative error of a prediction."""
    return simulated_step(counted, constants).total / row.seconds - 1


def table(leave_one_out: bool) -> str:
    """All rows as Markdown, with the errors of each kind."""
    counted = {row: count(row.job()) for row in ROWS}
    rows = [row for row in ROWS if row.fit]
    constants = Constants()
    calibrated = _calibrated(rows, counted, constants)
    lines = ["| row | GPUs | published | predicted | error | calibrated | left out | source |",
             "|---|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for row in ROWS:
        left = ""
        if leave_one_out and row.fit:
            others = [other for other in rows if other is not row]
            alone = fitted(others, [counted[other] for other in others], constants)
            left = f"{error(row, counted[row], alone):+.1%}"
        time = simulated_step(counted[row], constants).total
        name = row.name + (" (natural routing)" if row.natural else "") + (f": {row.missing}" if row.missing else "")
        calibration = f"{calibrated[row]:+.1%}" if row in calibrated else ""
        off = error(row, counted[row], constants)
        measured = f"{row.seconds:.4g} s | {time:.4g} s | {off:+.1%}"
        lines.append(f"| {name} | {row.gpus} {row.gpu} | {measured} | {calibration} | {left} | {row.source} |")
    return "\n".join([*lines, ""])


def _calibrated(
    rows: Sequence[PublishedStep], counted: dict[PublishedStep, Counted], constants: Constants
) -> dict[PublishedStep, float]:
    """Errors of the rows of one GPU and stack when the first of them scales the others."""
    groups: dict[tuple[str, str], list[PublishedStep]] = defaultdict(list)
    for row in rows:
        groups[row.gpu, row.stack.name].append(row)
    found = {}
    for first, *others in groups.values():
        scale = 1 + error(first, counted[first], constants)
        for other in others:
            found[other] = (1 + error(other, counted[other], constants)) / scale - 1
    return found


def main() -> None:
    if "--write" in sys.argv and "--leave-one-out" not in sys.argv:
        sys.exit("--write needs --leave-one-out: the page has a column for it")
    rows = [row for row in ROWS if row.fit]
    print("fit:", fitted(rows, [count(row.job()) for row in rows], Constants()))
    print("in use:", Constants())
    text = table("--leave-one-out" in sys.argv)
    print(text)
    if "--write" in sys.argv:
        keep_table(BEGIN, text, END)


if __name__ == "__main__":
    main()
