"""The benchmark of growing sizes, in short: exponents of known growth, and a figure of real steps."""

from __future__ import annotations

import pytest

from tools.bench import scaling


def test_an_exponent_is_the_slope_of_the_logarithms():
    growth = scaling.Growth([2, 4, 8, 16], [3 * size**1.5 for size in (2, 4, 8, 16)])
    assert growth.exponent == pytest.approx(1.5) and growth.last_exponent == pytest.approx(1.5)
    bent = scaling.Growth([1, 2, 4], [1.0, 1.0, 2.0])
    assert bent.exponent == pytest.approx(0.5) and bent.last_exponent == pytest.approx(1.0)


def test_steps_of_every_axis_run_and_are_drawn(one_rank, tmp_path):
    growths = {axis: scaling.growth_of(axis, doublings=1, rounds=1, platform=one_rank) for axis in scaling.AXES}
    assert all(
        growth.sizes == [least, 2 * least]
        for growth, least in zip(growths.values(), scaling.SMALLEST.values(), strict=True)
    )
    assert all(min(growth.seconds) > 0 for growth in growths.values())
    scaling.draw(growths, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
