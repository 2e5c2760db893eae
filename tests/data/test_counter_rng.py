"""Addressed random numbers: uniform, independent of shape, different for different counters."""

from __future__ import annotations

import numpy as np

from megatron_r1.data.counter_rng import uniforms


def test_draws_are_addressed():
    grid = uniforms(7, np.arange(5)[:, None], np.arange(3))
    assert grid.shape == (5, 3) and grid.dtype == np.float64
    assert all(grid[i, j] == uniforms(7, i, j) for i in range(5) for j in range(3))
    assert (grid != uniforms(8, np.arange(5)[:, None], np.arange(3))).all()
    assert uniforms(0, 1, 2) != uniforms(0, 2, 1)


def test_draws_are_uniform_and_unrelated():
    draws = uniforms(0, np.arange(400)[:, None], np.arange(500))
    counts = np.histogram(draws, 20, (0, 1))[0]
    # 19 degrees of freedom: 43.8 is passed once in a thousand times.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 43.8
    for axis in (0, 1):
        one, next_one = np.delete(draws, 0, axis).ravel(), np.delete(draws, -1, axis).ravel()
        assert abs(np.corrcoef(one, next_one)[0, 1]) < 0.01
