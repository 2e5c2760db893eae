"""Scheduled values against the formulas and DeepSeek-V3's numbers, and skipped updates in a row."""

from __future__ import annotations

import math

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.schedule import BatchRampConfig, PhaseConfig, ScheduleConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.errors import ConfigError, Diverged
from megatron_r1.train.routing import pretraining_policy
from megatron_r1.train.schedule import batch_size, learning_rate, value_at
from megatron_r1.train.update import count_skips

T = 10**12
LATE = 10**6
"""A step after any warm-up."""


def schedule(decay: str, warmup: int = 10) -> ScheduleConfig:
    return ScheduleConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup_steps=warmup, lr_decay_style=decay)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_from_zero(decay):
    rates = [learning_rate(schedule(decay), step, 110, 0) for step in range(1, 11)]
    assert rates == pytest.approx([2e-3 * step / 10 for step in range(1, 11)], rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [2e-3, 2e-3, 2e-3]),
        ("linear", [1.55e-3, 1.1e-3, 2e-4]),
        ("cosine", [2e-4 + 9e-4 * (1 + math.sqrt(0.5)), 1.1e-3, 2e-4]),
    ],
)
def test_decay_at_a_quarter_a_half_and_the_end(decay, expected):
    rates = [learning_rate(schedule(decay), step, 110, 0) for step in (35, 60, 110)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_is_near_the_peak_and_late_steps_stay_final():
    assert learning_rate(schedule("linear", 0), 1, 100, 0) == pytest.approx(2e-3 - 1.8e-3 / 100)
    assert learning_rate(schedule("cosine", 0), 101, 100, 0) == pytest.approx(2e-4)


@pytest.fixture(scope="module")
def v3():
    """The shipped schedules of DeepSeek-V3."""
    return load("pretrain", [], "pretrain_v3")


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0.5 * T, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (11.075 * T, 1.910036e-4),
        (12.15 * T, 1.21e-4),
        (13.225 * T, 5.09964e-5),
        (14.3 * T, 2.2e-5),
        (14.633 * T - 1, 2.2e-5),
        (14.633 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
        (15 * T, 7.3e-6),
    ],
)
def test_learning_rate_of_deepseek_v3(v3, tokens, rate):
    assert learning_rate(v3.train.schedule, LATE, v3.train.steps, int(tokens)) == pytest.approx(rate, rel=1e-6)


def test_warm_up_of_deepseek_v3_is_by_step(v3):
    rates = [
        learning_rate(v3.train.schedule, step, v3.train.steps, step * 3072 * 4096) for step in (1, 500, 2000, 2001)
    ]
    assert rates == pytest.approx([1.1e-7, 5.5e-5, 2.2e-4, 2.2e-4], rel=1e-12)


def test_weights_and_rates_of_deepseek_v3_change_at_their_tokens(v3):
    phases, policy = v3.train.schedule.mtp_weight_phases, pretraining_policy(v3)
    weights = [value_at(v3.model.mtp.loss_coefficient, phases, int(tokens * T)) for tokens in (0, 9.999, 10, 14.8)]
    assert weights == [0.3, 0.3, 0.1, 0.1]
    assert [policy.bias_rate_at(int(tokens * T)) for tokens in (0, 14.299, 14.3, 14.8)] == [1e-3, 1e-3, 0.0, 0.0]
    assert policy.sequence_loss == 1e-4


def test_batches_of_deepseek_v3_grow_evenly_and_reach_its_last_token(v3):
    train, tokens, sizes = v3.train, 0, []
    for _ in range(train.steps):
        assert tokens < 14.8 * T
        size = batch_size(train, tokens)
        sizes += [] if sizes and sizes[-1] == size else [size]
        tokens += size * train.sequence_length
    assert 14.8 * T <= tokens < 14.8 * T + 15360 * 4096
    assert sizes == list(range(3072, 15361, 384)) == list(train.batch_sizes())
    assert all(size % 128 == 0 for size in sizes)
    ramp = 469 * 10**9
    assert [batch_size(train, at) for at in (ramp // 32 - 1, ramp // 32 + 1, ramp // 2, ramp - 1, ramp)] == [
        3072, 3456, 9216, 14976, 15360,
    ]  # fmt: skip


def test_a_value_goes_from_phase_to_phase():
    phases = [
        PhaseConfig(until=100, value=4.0, shape="linear"),
        PhaseConfig(until=200, value=1.0),
        PhaseConfig(until=300, value=3.0, shape="cosine"),
    ]
    found = [value_at(2.0, phases, tokens) for tokens in (0, 25, 99, 100, 199, 200, 225, 250, 300, 999)]
    assert found == pytest.approx([2.0, 2.5, 3.98, 1.0, 1.0, 1.0, 2 - math.sqrt(0.5), 2.0, 3.0, 3.0], rel=1e-12)
    assert value_at(2.0, [], 5) == 2.0


def test_a_rate_by_tokens_may_fall_during_the_warm_up():
    phases = [PhaseConfig(until=100, value=0.0, shape="linear")]
    by_tokens = ScheduleConfig(
        learning_rate=1e-2, min_learning_rate=0.0, warmup_steps=4, lr_decay_style="tokens", learning_rate_phases=phases
    )
    assert [learning_rate(by_tokens, step, 9, 10 * step - 10) for step in (1, 4, 5, 9)] == pytest.approx(
        [1e-2 / 4, 0.7e-2, 0.6e-2, 0.2e-2]
    )


def test_without_a_ramp_every_batch_is_full():
    train = TrainConfig(global_batch_size=10)
    assert {batch_size(train, tokens) for tokens in (0, 1, T)} == {10} and list(train.batch_sizes()) == [10]


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"lr_decay_style": "tokens"}, "learning_rate_phases", "must name phases for lr_decay_style=tokens"),
        ({"learning_rate_phases": [PhaseConfig()]}, "learning_rate_phases", "must be [] for lr_decay_style=cosine"),
        (
            {"lr_decay_style": "tokens", "learning_rate_phases": [PhaseConfig(value=1e-4)]},
            "min_learning_rate",
            "must be 0.0001",
        ),
        ({"bias_rate_phases": [PhaseConfig(until=5)] * 2}, "bias_rate_phases.until", "must be above 5"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(changes, key, allowed):
    with pytest.raises(ConfigError) as caught:
        ScheduleConfig(**changes)
    assert caught.value.key == key and caught.value.allowed.startswith(allowed)


@pytest.mark.parametrize(
    ("ramp", "micro", "key"),
    [
        ({"start": 12, "increment": 2}, 1, "schedule.batch_ramp.start"),
        ({"start": 4, "increment": 4}, 1, "schedule.batch_ramp.increment"),
        ({"start": 4, "increment": 3}, 2, "micro_batch_size"),
    ],
)
def test_ramps_that_do_not_fit_are_refused(ramp, micro, key):
    schedule = ScheduleConfig(batch_ramp=BatchRampConfig(tokens=100, **ramp))
    with pytest.raises(ConfigError) as caught:
        TrainConfig(global_batch_size=10, micro_batch_size=micro, schedule=schedule)
    assert caught.value.key == key


def test_skips_in_a_row_are_counted_until_a_finite_update():
    assert count_skips(2, True, 3, step=7) == 3
    assert count_skips(3, False, 3, step=8) == 0
    with pytest.raises(Diverged, match="step 9.*4 updates in a row.*max_skipped_steps=3"):
        count_skips(3, True, 3, step=9)
    with pytest.raises(Diverged):
        count_skips(0, True, 0, step=1)
