"""What failures and saving cost."""

from __future__ import annotations

import random

import pytest

from megatron_r1.config.load import load
from megatron_r1.plan.cost import RESTART_S, cost, least_lost, lost_share


def test_rare_failures_cost_what_young_found() -> None:
    """sqrt(2 saving / between failures), where that is small (Young 1974)."""
    assert least_lost(10.0, 1e6, 0.0, 1.0)[1] == pytest.approx((2 * 10 / 1e6) ** 0.5, rel=0.01)
    assert least_lost(0.0, 1e6, 100.0, 1e3)[1] == pytest.approx(100 / 1e6 + 1e3 / 2e6, rel=0.01)


def test_frequent_failures_cost_what_they_do_in_a_simulation() -> None:
    """Work of 600 s between saves of 200 s, with a failure every 1,800 s and restarts of 300 s, which fail too."""
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
    least = least_lost(200.0, 1800.0, 300.0, 60.0)[1]
    assert 0.9 * at_600 < least < 1.01 * at_600


@pytest.mark.parametrize("background", [False, True])
def test_a_run_is_longer_by_what_failures_and_saving_cost(background: bool) -> None:
    config = load("pretrain", ["model=moonlight_16b", "plan.tokens=1e12", "train.sequence_length=4096",
                               "train.global_batch_size=1024",
                               f"train.async_save={str(background).lower()}"])  # fmt: skip
    found = cost(config, "pretrain", 1024, 8, 2.0)
    between = config.plan.node_failure_days * 86_400 / 128
    saving, restart = (
        (0.0, RESTART_S + found.checkpoint_seconds) if background else (found.checkpoint_seconds, RESTART_S)
    )
    assert found.lost_share == lost_share(found.save_every_seconds, saving, between, restart)
    assert found.days * 86_400 == pytest.approx(found.steps * 2.0 / (1 - found.lost_share))
    young = (2 * found.checkpoint_seconds * between) ** 0.5
    assert found.save_every_seconds == pytest.approx(young, rel=0.1)
