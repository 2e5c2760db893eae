"""Rewards of tokens, generalized advantages and the critic's loss against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.rl.advantages.gae import critic_loss, generalized_advantages, token_rewards, whitened


def drawn(seed: int, responses: int = 4, length: int = 6):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, old, returns = (
        torch.randn(responses, length, dtype=torch.float64, generator=generator) for _ in range(4)
    )
    mask = torch.rand(responses, length, generator=generator) < 0.6
    mask[0] = False
    mask[1] = torch.tensor([True] + [False] * (length - 1))
    return rewards, values, old, returns, mask


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0)])
def test_advantages_are_the_sum_written_out(discount, decay):
    for seed in range(5):
        rewards, values, _, _, mask = drawn(seed)
        spoilt = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
        found = generalized_advantages(*spoilt, mask, discount, decay)
        for i in range(len(mask)):
            tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
            v = [float(values[i, t]) for t in tokens] + [0.0]
            delta = [float(rewards[i, t]) + discount * v[k + 1] - v[k] for k, t in enumerate(tokens)]
            for k, t in enumerate(tokens):
                expected = sum((discount * decay) ** j * d for j, d in enumerate(delta[k:]))
                assert float(found.advantages_BL[i, t]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
                assert float(found.returns_BL[i, t]) == pytest.approx(expected + v[k], rel=1e-12, abs=1e-14)
        assert not found.advantages_BL[~mask].any() and not found.returns_BL[~mask].any()


def test_without_discount_the_return_is_what_is_still_to_come():
    rewards, values, _, _, mask = drawn(0)
    returns = generalized_advantages(rewards, values, mask).returns_BL
    to_come = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[mask], to_come[mask])


def test_the_reward_comes_with_the_last_token_and_the_penalty_with_each():
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    penalties = torch.tensor([[0.1, 0.2, torch.nan, 0.3, torch.nan]] * 2)
    found = token_rewards(torch.tensor([2.0, 3.0]), penalties, mask, 0.5)
    torch.testing.assert_close(found, torch.tensor([[-0.05, -0.1, 0.0, 1.85, 0.0], [0.0] * 5]))


def test_the_critics_loss_is_a_loop_over_tokens():
    for seed in range(5):
        _, values, old, returns, mask = drawn(seed)
        values = torch.where(mask, values, torch.nan).requires_grad_()
        loss, metrics = critic_loss(values, old, returns, mask, clip=0.2, num_tokens=int(mask.sum()))
        terms, decided, gradient = [], 0, torch.zeros_like(old)
        for i, t in mask.nonzero().tolist():
            v, v_old, target = (float(x[i, t].detach()) for x in (values, old, returns))
            limited = min(max(v, v_old - 0.2), v_old + 0.2)
            terms.append(max((v - target) ** 2, (limited - target) ** 2))
            decided += (limited - target) ** 2 > (v - target) ** 2
            gradient[i, t] = 0.0 if (limited - target) ** 2 > (v - target) ** 2 else (v - target) / int(mask.sum())
        assert float(loss.detach()) == pytest.approx(0.5 * math.fsum(terms) / len(terms), rel=1e-12)
        assert float(metrics["critic/clip_fraction"]) == pytest.approx(decided / len(terms)) and decided
        loss.backward()
        torch.testing.assert_close(values.grad, gradient)


def test_whitened_advantages_have_no_mean_and_deviation_one():
    values, *_, mask = drawn(1)
    found = whitened(torch.where(mask, values, torch.nan), mask)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found[mask].var(unbiased=False)) == pytest.approx(1, rel=1e-6)
    assert not found[~mask].any() and not whitened(values, torch.zeros_like(mask)).any()
