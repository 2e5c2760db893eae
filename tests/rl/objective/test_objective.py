"""The objective against numbers worked out by hand, a loop over tokens, and numerical gradients."""

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from megatron_r1.rl.objective import kl, policy_terms
from megatron_r1.rl.objective.aggregation import BatchTotals, sequence_mean
from megatron_r1.rl.objective.objective import Objective, ObjectiveInputs
from megatron_r1.rl.objective.policy_terms import Clip

k3, ratio_of, grpo, grpo_sequence = (
    jaxtyped(typechecker=beartype)(function)
    for function in (kl.k3, policy_terms.ratio_of, policy_terms.grpo, policy_terms.grpo_sequence)
)
LEVELS = {"token": (grpo, "grpo"), "sequence": (grpo_sequence, "grpo_sequence")}


def grpo_loss(new, old, reference, advantages, mask, *, num_responses, epsilon, kl_coefficient=0.0, level="token"):
    """Both papers' GRPO."""
    objective = Objective(Clip(epsilon, epsilon), LEVELS[level][1], kl_coefficient=kl_coefficient)
    return objective.loss(ObjectiveInputs(new, old, advantages, mask, reference), BatchTotals(num_responses))


def clipped_objective(new, old, advantages, mask, epsilon, level="token"):
    """Of each response."""
    return sequence_mean(LEVELS[level][0](new, old, advantages, mask, Clip(epsilon, epsilon)).objective, mask)


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_case(seed, responses=5, length=7):
    generator = torch.Generator().manual_seed(seed)
    logprobs, noise, drift = (
        torch.randn(responses, length, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    mask = torch.rand(responses, length, generator=generator) < 0.6
    mask[0] = False
    advantages = torch.randn(responses, dtype=torch.float64, generator=generator)
    return logprobs - 3, logprobs - 3 + 0.3 * noise, logprobs - 3 + 0.4 * drift, advantages, mask


def loop_loss(logprobs, old, reference, advantages, mask, epsilon, beta, level):
    """The same loss, one token after the other, with nothing but math."""
    total = 0.0
    for i in range(len(advantages)):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        if not tokens:
            continue
        spans = [[t] for t in tokens] if level == "token" else [tokens]
        for span in spans:
            policy, before, anchor = (sum(x[i, t].item() for t in span) for x in (logprobs, old, reference))
            ratio, a = math.exp(policy - before), advantages[i].item()
            limited = min(max(ratio, 1 - epsilon), 1 + epsilon)
            kl = math.exp(anchor - policy) - (anchor - policy) - 1
            total -= (min(ratio * a, limited * a) - beta * kl) / len(spans)
    return total / len(advantages)


@pytest.mark.parametrize(
    ("log_ratio", "expected"),
    [(0.0, 0.0), (math.log(2), 0.306853), (-math.log(2), 0.193147), (0.1, 0.005171), (-0.1, 0.004837)],
)
def test_k3_fixtures(log_ratio, expected):
    value = k3(torch.tensor(-1.5, dtype=torch.float64), torch.tensor(-1.5 + log_ratio, dtype=torch.float64))
    assert round(value.item(), 6) == expected


def test_k3_is_never_negative_and_keeps_its_digits():
    log_ratio = torch.cat([torch.linspace(-60, 60, 2001), torch.logspace(-18, -1, 100)])
    for dtype in (torch.float32, torch.float64):
        values = k3(torch.zeros(2101, dtype=dtype), log_ratio.to(dtype))
        assert (values >= 0).all() and values.isfinite().all()
    tiny = torch.tensor(1e-4, dtype=torch.float64)
    assert k3(torch.zeros_like(tiny), tiny).item() == pytest.approx(5e-9, rel=1e-4)


def test_token_level_by_hand():
    # Response 0, A = +2, two tokens, ratios 1.5 and 0.5, epsilon 0.2: min(3, 2.4) = 2.4 and min(1, 1.6) = 1; mean 1.7.
    # Response 1, A = -1, one token, ratio 1.5: min(-1.5, -1.2) = -1.5.
    # Response 2, A = -1, one token, ratio 0.5: min(-0.5, -0.8) = -0.8.
    old = torch.stack([logs(0.4, 0.4), logs(0.4, 1.0), logs(0.4, 1.0)])
    new = torch.stack([logs(0.6, 0.2), logs(0.6, 1.0), logs(0.2, 1.0)])
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    advantages = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
    assert clipped_objective(new, old, advantages, mask, 0.2).tolist() == pytest.approx([1.7, -1.5, -0.8])
    loss, metrics = grpo_loss(new, old, None, advantages, mask, num_responses=3, epsilon=0.2)
    assert loss.item() == pytest.approx(-(1.7 - 1.5 - 0.8) / 3)
    assert metrics["policy/ratio"].item() == pytest.approx((1.0 + 1.5 + 0.5) / 3)
    assert metrics["policy/ratio_clipped"].item() == pytest.approx(((1.2 + 0.8) / 2 + 1.2 + 0.8) / 3)
    assert metrics["policy/objective"].item() == pytest.approx(-0.6 / 3)
    assert metrics["policy/advantage"].item() == pytest.approx(0.0)
    assert metrics["policy/clip_fraction"].item() == pytest.approx((0.5 + 0 + 1) / 3)


def test_sequence_level_by_hand():
    # Whole-response ratio 1.5 * 0.5 = 0.75, epsilon 0.2: A = +2 gives min(1.5, 1.6) = 1.5; A = -2 gives -1.6.
    old = logs(0.4, 0.4).expand(2, 2)
    new = logs(0.6, 0.2).expand(2, 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantages = torch.tensor([2.0, -2.0], dtype=torch.float64)
    assert clipped_objective(new, old, advantages, mask, 0.2, "sequence").tolist() == pytest.approx([1.5, -1.6])
    # k3 of the whole response with reference = old: 1/0.75 - log(1/0.75) - 1.
    kl = 1 / 0.75 - math.log(1 / 0.75) - 1
    loss, metrics = grpo_loss(
        new, old, old, advantages, mask, num_responses=2, epsilon=0.2, kl_coefficient=0.5, level="sequence"
    )
    assert metrics["policy/kl"].item() == pytest.approx(kl)
    assert metrics["policy/kl_loss"].item() == pytest.approx(0.5 * kl)
    assert loss.item() == pytest.approx(0.5 * kl - (1.5 - 1.6) / 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("epsilon", [0.1, 0.2, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_a_loop_over_tokens(level, epsilon, seed):
    new, old, reference, advantages, mask = random_case(seed)
    expected = loop_loss(new, old, reference, advantages, mask, epsilon, 0.04, level)
    loss, metrics = grpo_loss(
        new, old, reference, advantages, mask, num_responses=5, epsilon=epsilon, kl_coefficient=0.04, level=level
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert metrics["policy/loss"].item() == loss.item()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("epsilon", [0.2, 10.0])
def test_gradient_equals_numerical_gradient(level, epsilon):
    new, old, reference, advantages, mask = random_case(11, responses=4, length=3)

    def loss(logprobs):
        return grpo_loss(
            logprobs,
            old,
            reference,
            advantages,
            mask,
            num_responses=4,
            epsilon=epsilon,
            kl_coefficient=0.1,
            level=level,
        )[0]

    assert torch.autograd.gradcheck(loss, new.requires_grad_())


def test_exponential_continues_as_its_tangent():
    low, high = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (19.5, 21.5))
    torch.autograd.backward([ratio_of(low), ratio_of(high)])
    assert low.grad.item() == pytest.approx(math.exp(19.5))
    assert high.grad.item() == pytest.approx(math.exp(20))
    assert ratio_of(high).item() == pytest.approx(2.5 * math.exp(20))
    assert torch.autograd.gradcheck(
        lambda x: ratio_of(x) / 1e9, torch.tensor([-3.0, 0.0, 2.0]).double().requires_grad_()
    )


@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_value_is_the_advantage_and_gradient_is_policy_gradient(level):
    new, _, _, advantages, mask = random_case(5)
    new.requires_grad_()
    loss, metrics = grpo_loss(new, new.detach(), None, advantages, mask, num_responses=5, epsilon=0.2, level=level)
    loss.backward()
    lengths = mask.sum(1)
    answered = lengths > 0
    assert loss.item() == pytest.approx(-(advantages * answered).sum().item() / 5)
    assert metrics["policy/ratio"].item() == pytest.approx(answered.sum().item() / 5)
    assert metrics["policy/clip_fraction"].item() == 0
    share = 1 / lengths.clamp(min=1) if level == "token" else torch.ones(5)
    torch.testing.assert_close(new.grad, -(advantages * share)[:, None] * mask / 5)


def test_epsilon_of_ten_clips_only_large_ratios_of_good_responses():
    ratios, advantages = [0.01, 10.9, 12.0, 12.0], [-1.0, 1.0, 1.0, -1.0]
    new = torch.tensor(ratios, dtype=torch.float64).log()[:, None].requires_grad_()
    mask = torch.ones(4, 1, dtype=torch.bool)
    values = clipped_objective(new, torch.zeros_like(new), torch.tensor(advantages).double(), mask, 10.0)
    assert values.tolist() == pytest.approx([-0.01, 10.9, 11.0, -12.0])
    values.sum().backward()
    assert new.grad[:, 0].tolist() == pytest.approx([-0.01, 10.9, 0.0, -12.0])


@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_add_up(level):
    *tensors, advantages, mask = random_case(7, responses=6)
    tensors[0].requires_grad_()
    options = {"num_responses": 6, "epsilon": 0.2, "kl_coefficient": 0.04, "level": level}
    whole, metrics = grpo_loss(*tensors, advantages, mask, **options)
    gradient = torch.autograd.grad(whole, tensors[0])[0]
    parts = [
        grpo_loss(*(tensor[rows] for tensor in tensors), advantages[rows], mask[rows], **options)
        for rows in ([4, 0], [1], [5, 3, 2])
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(loss for loss, _ in parts), tensors[0])[0], gradient)
    for name, value in metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(sum(part[name] for _, part in parts), value)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_and_empty_responses_have_no_effect(level):
    new, old, reference, advantages, mask = random_case(9)
    clean = [torch.where(mask, tensor, 0.0) for tensor in (new, old, reference)]
    spoilt = [torch.where(mask, tensor, torch.nan) for tensor in (new, old, reference)]
    results = []
    for tensors in (clean, spoilt):
        tensors[0].requires_grad_()
        loss, metrics = grpo_loss(
            *tensors, advantages, mask, num_responses=5, epsilon=0.2, kl_coefficient=0.1, level=level
        )
        loss.backward()
        results.append((loss, tensors[0].grad, metrics))
    torch.testing.assert_close(results[0], results[1])
    assert results[1][1].isfinite().all()
    empty = torch.zeros_like(mask)
    loss, metrics = grpo_loss(*clean, advantages, empty, num_responses=5, epsilon=0.2, kl_coefficient=0.1, level=level)
    loss.backward()
    assert loss.item() == 0 and all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gap", [-50.0, 50.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_far_policies_stay_finite_in_float32(level, gap, advantage):
    new = torch.full((1, 64), gap, requires_grad=True)
    far, mask = torch.zeros(1, 64), torch.ones(1, 64, dtype=torch.bool)
    loss, metrics = grpo_loss(
        new, far, far, torch.tensor([advantage]), mask, num_responses=1, epsilon=0.2, kl_coefficient=0.1, level=level
    )
    loss.backward()
    assert loss.isfinite() and new.grad.norm().isfinite()
    assert all(value.isfinite() for value in metrics.values())


def test_wrong_level_missing_reference_and_wrong_shapes_are_refused():
    new, old, _, advantages, mask = random_case(0)
    for wrong in ({"term": "word"}, {"aggregation": "word"}, {"kl_estimator": "word"}):
        with pytest.raises(ValueError, match="=word: must be one of"):
            Objective(Clip(0.2, 0.2), **wrong)
    with pytest.raises(ValueError, match="level=word"):
        policy_terms.at_level(new, mask, "word")
    with pytest.raises(ValueError, match="kl_coefficient=0.1"):
        grpo_loss(new, old, None, advantages, mask, num_responses=5, epsilon=0.2, kl_coefficient=0.1)
    with pytest.raises(TypeCheckError):
        clipped_objective(new, old[:, :-1], advantages, mask, 0.2)
    with pytest.raises(TypeCheckError):
        clipped_objective(new, old, advantages, mask.long(), 0.2)
