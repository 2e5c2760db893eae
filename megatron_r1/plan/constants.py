"""The constants of the time model: five that all GPUs share, and one factor between two generations of software."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """All that the time model fits; everything else is counted from the model, the layout and the datasheet.

    Source: least squares over the published steps of published.py (tools/plan/fit.py prints the fit, README.md in this
    folder keeps it). They are of this model, not of a kernel: a matrix product is charged its FLOPs and, on top, its
    bytes, so that the share of the peak that it reaches as a whole is lower than `matrix`.
    """

    matrix: float = 0.950
    """Share of the sustained peak rate that the FLOPs of matrix products reach."""
    attention: float = 0.546
    """The same of attention's own products; the long sequences of Qwen3-235B decide it."""
    memory: float = 0.692
    """Share of the memory's bandwidth at which bytes are read and written."""
    link: float = 0.245
    """Share of a link's bandwidth that collectives reach, but for the experts' exchange (exchange.py)."""
    launch: float = 3.70e-5
    """Seconds that the host takes for a kernel without CUDA graphs, while the GPU waits: routing without dropped tokens
    makes the host wait in each layer for how many tokens each expert has, so that it cannot run ahead."""
    older: float = 1.18
    """Factor on computation of releases for Blackwell before June 2026, without fused grouped products."""
    exchange: float = 1.0
    """Factor on what benchmarks say of the experts' exchange: not fitted, but that of a run where one calibrates."""


UNCERTAINTY = 0.2
"""Relative error of a step's seconds within which the published steps are (README.md of this folder)."""
