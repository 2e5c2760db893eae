"""Fits three constants of sampling to published steps of reinforcement learning: tools/plan/fit_rl.py [--write].

Prints each row with what the model predicts, and with what constants predict that were fitted without the row; --write
keeps the table in megatron_r1/plan/README.md. The trainer's constants are those of tools/plan/fit.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from readme import keep_table
from scipy.optimize import least_squares

from megatron_r1.plan.constants import Constants
from megatron_r1.plan.decode import rollout_seconds
from megatron_r1.plan.published_rl import BOUNDS, ROLLOUTS, PublishedRollout
from megatron_r1.plan.rollout import RolloutStep
from megatron_r1.plan.serving import ServingConstants

FITTED = ("network", "step", "sequence")
"""Constants that are fitted."""
LOW, HIGH = (1e-5, 1e-4, 1e-6), (5e-4, 2e-2, 4e-4)
BEGIN, END = "<!-- rows: tools/plan/fit_rl.py --write -->\n", "<!-- end of rows of reinforcement learning -->"
SPREAD = 0.15
"""Relative error from which on a row counts less than by its square."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A row with its step, whose rollout alone depends on the constants that are fitted."""

    row: PublishedRollout
    step: RolloutStep

    def with_rollout(self, serving: ServingConstants) -> RolloutStep:
        """The step with other constants of sampling."""
        row, config = self.row, self.row.job().config
        seconds = rollout_seconds(config, row.job().gpu, row.engines, row.responses, Constants(), serving, row.stack)
        return replace(self.step, rollout=seconds)

    def error(self, serving: ServingConstants) -> float:
        """Relative error of the predicted seconds."""
        return self.with_rollout(serving).total / self.row.seconds - 1


def fitted(rows: Sequence[Measured], start: ServingConstants) -> ServingConstants:
    """Constants of the smallest sum of squared logarithmic errors, of which large ones count less."""

    def constants(values: NDArray[np.float64]) -> ServingConstants:
        return replace(start, **dict(zip(FITTED, map(float, values), strict=True)))

    def errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log1p([row.error(constants(values)) for row in rows])

    first = np.array([getattr(start, name) for name in FITTED])
    found = least_squares(errors, first, bounds=(LOW, HIGH), x_scale=first, loss="soft_l1", f_scale=SPREAD)
    return constants(found.x)


def table() -> str:
    """All rows as Markdown."""
    serving = ServingConstants()
    measured = [Measured(row, row.predicted(Constants())) for row in ROLLOUTS]
    used = [one for one in measured if one.row.fit]
    columns = ("row", "GPUs", "published", "predicted", "error", "left out", "parts, published / predicted",
               "assumed; missing", "source")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---:|---:|---|---|---|"]
    for one in measured:
        row, total = one.row, one.step.total
        left = ""
        if row.fit:
            left = f"{one.error(fitted([other for other in used if other is not one], serving)):+.0%}"
        said = "; ".join(text for text in (row.assumed, row.missing) if text)
        lines.append(
            f"| {row.name} | {_gpus(row)} | {row.seconds:g} s | {total:.4g} s | {one.error(serving):+.0%} | {left} | "
            f"{_parts(one)} | {said} | {row.source} |"
        )
    lines += ["", "Upper bounds, which nightly tests hold:", "",
              "| row | GPUs | bound | predicted | assumed | source |", "|---|---|---:|---:|---|---|"]  # fmt: skip
    for row in BOUNDS:
        total = row.predicted(Constants()).total
        lines.append(
            f"| {row.name} | {_gpus(row)} | {row.seconds:g} s | {total:.3g} s | {row.assumed} | {row.source} |"
        )
    return "\n".join([*lines, ""])


def _gpus(row: PublishedRollout) -> str:
    own = f" + {row.servers} of servers" if row.servers else ""
    return f"{row.trainers}{own} {row.gpu}"


def _parts(one: Measured) -> str:
    step = one.step
    found = {"rollout": step.rollout, "logprobs": step.logprobs, "update": step.update,
             "handover": step.sync + step.memory}  # fmt: skip
    return ", ".join(f"{name} {seconds:g} / {found[name]:.3g}" for name, seconds in one.row.parts.items())


def main() -> None:
    measured = [Measured(row, row.predicted(Constants())) for row in ROLLOUTS if row.fit]
    print("fit:", fitted(measured, ServingConstants()))
    print("in use:", ServingConstants())
    text = table()
    print(text)
    if "--write" in sys.argv:
        keep_table(BEGIN, text, END)


if __name__ == "__main__":
    main()
