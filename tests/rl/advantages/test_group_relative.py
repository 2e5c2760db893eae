"""Group advantages against the worked example and plain arithmetic."""

import statistics

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from megatron_r1.rl.advantages import group_relative as advantage

group_advantages = jaxtyped(typechecker=beartype)(advantage.group_advantages)
process_advantages = jaxtyped(typechecker=beartype)(advantage.process_advantages)

EXAMPLE = [0.1, 1.1, 1.0, 0.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("population", [-0.997241, 1.102214, 0.892269, -0.997241]),
        ("sample", [-0.863636, 0.954545, 0.772727, -0.863636]),
        ("none", [-0.475, 0.525, 0.425, -0.475]),
    ],
)
def test_worked_example_to_six_digits(std, expected, dtype):
    advantages = group_advantages(torch.tensor([EXAMPLE], dtype=dtype), std)
    assert advantages.dtype == dtype
    assert [round(value, 6) for value in advantages[0].tolist()] == pytest.approx(expected, abs=1.1e-7)


def test_worked_example_with_strict_format():
    rewards = [0.1, 1.1, 1.0, 0.0]
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    expected = [(reward - mean) / deviation for reward in rewards]
    assert group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist() == pytest.approx(expected)


def test_standard_deviations_of_the_example():
    assert statistics.fmean(EXAMPLE) == pytest.approx(0.575)
    assert statistics.pstdev(EXAMPLE) == pytest.approx(0.4763139721, abs=1e-10)
    assert statistics.stdev(EXAMPLE) == pytest.approx(0.55, abs=1e-12)


@pytest.mark.parametrize("std", advantage.STD_KINDS)
@given(value=st.floats(-1e6, 1e6) | st.sampled_from([0.1, 1.1]), size=st.integers(1, 17))
def test_equal_rewards_give_exactly_zero(std, value, size):
    rewards = torch.full((2, size), value, dtype=torch.float64)
    rewards[1] = torch.arange(size)
    advantages = group_advantages(rewards, std)
    assert torch.equal(advantages[0], torch.zeros(size, dtype=torch.float64))
    assert advantages.isfinite().all()
    assert size == 1 or advantages[1].abs().max() > 0


@given(st.lists(st.lists(st.floats(-10, 10, width=16), min_size=4, max_size=4), min_size=1, max_size=5))
def test_each_group_is_centred_and_scaled_on_its_own(groups):
    advantages = group_advantages(torch.tensor(groups, dtype=torch.float64))
    for group, row in zip(groups, advantages, strict=True):
        assert row.sum().item() == pytest.approx(0, abs=1e-9)
        assert row.square().mean().item() == pytest.approx(0 if len(set(group)) == 1 else 1)


def test_rounded_mean_of_equal_rewards_leaves_no_rest():
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.mean() != rewards[0, 0]
    assert not group_advantages(rewards).any()


def test_unknown_divisor_and_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="std=variance"):
        group_advantages(torch.zeros(1, 2), "variance")
    with pytest.raises(TypeCheckError):
        group_advantages(torch.zeros(4))


def test_step_rewards_are_normalised_over_the_group_and_summed_from_the_token_on():
    rewards, ends = [[1.0, 0.0], [], [0.5]], [[1, 3], [], [2]]
    mean, deviation = 0.5, statistics.pstdev([1.0, 0.0, 0.5])
    first, second, third = ((reward - mean) / deviation for reward in (1.0, 0.0, 0.5))
    expected = [[first + second] * 2 + [second] * 2 + [0.0], [0.0] * 5, [third] * 3 + [0.0] * 2]
    assert process_advantages(rewards, ends, 5).tolist() == [pytest.approx(row, abs=1e-7) for row in expected]
    plain = process_advantages(rewards, ends, 5, "none")
    assert plain[0].tolist() == pytest.approx([0.0, 0.0, -0.5, -0.5, 0.0])
    assert (
        not process_advantages([[0.3], [0.3, 0.3]], [[0], [0, 1]], 2).any()
        and not process_advantages([[]], [[]], 3).any()
    )


@pytest.mark.parametrize("ends", [[1, 0], [0, 5], [0], [-1, 1]])
def test_steps_that_do_not_fit_their_response_are_refused(ends):
    with pytest.raises(ValueError, match="step_ends="):
        process_advantages([[1.0, 0.0]], [ends], 5)
