"""The constants of the time model: six that all GPUs share, and one factor between two generations of software."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """All that the time model fits; everything else is counted from the model, the layout and the datasheet.

    Source: least squares over the published steps of published.py (tools/plan/fit.py prints the fit, README.md in this
    folder keeps it). They are of this model, not of a kernel: a matrix product is charged its FLOPs and, on top, its
    bytes, so that the share of the peak that it reaches as a whole is lower than `matrix`.
    """

    matrix: float = 0.927
    """Share of the sustained peak rate that the FLOPs of matrix products reach."""
    attention: float = 0.462
    """The same of attention's own products; the long sequences of Qwen3-235B decide it."""
    memory: float = 0.953
    """Share of the memory's bandwidth at which bytes are read and written."""
    link: float = 0.574
    """Share of a link's bandwidth that collectives reach."""
    launch: float = 3.48e-5
    """Seconds that the host takes for a kernel without CUDA graphs: a pass takes at least that for each of its kernels.
    The small micro-batches of Qwen3-30B decide it."""
    exposed: float = 0.504
    """Share of the experts' exchange that overlapping it with computation does not hide."""
    older: float = 1.36
    """Factor on computation of releases for Blackwell before June 2026, without fused grouped products."""


UNCERTAINTY = 0.2
"""Relative error of a step's seconds within which the published steps are (README.md of this folder)."""
