"""Each objective against TRL's own in float64: values and gradients over masks, empty responses, extreme ratios."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_r1.config.load import load
from megatron_r1.preference.dpo_loss import dpo_loss, response_logprob
from megatron_r1.rl.objective.aggregation import BatchTotals
from megatron_r1.rl.objective.importance_weights import ClipRange
from megatron_r1.rl.objective.objective import ImportanceSampling, Objective, ObjectiveInputs, build_objective
from megatron_r1.rl.objective.policy_terms import Clip
from megatron_r1.rl.policy.kl_penalty import build_kl_penalty
from tests.support.trl_losses import trl_dpo_loss, trl_policy_loss

LONGEST = 9
CLOSE = 1e-6
SEEDS = range(6)


def drawn(seed: int, responses: int = 8) -> tuple[ObjectiveInputs, BatchTotals]:
    """Random responses: one empty, one of a token, one of extreme ratios, one of advantage 0, as in an equal group."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old_BL = -normal(responses, LONGEST).abs() - 0.1
    lengths_B1 = torch.randint(2, LONGEST + 1, (responses, 1), generator=generator)
    lengths_B1[:2, 0] = torch.tensor([0, 1])
    mask_BL = torch.arange(LONGEST) < lengths_B1
    mask_BL &= torch.rand(responses, LONGEST, generator=generator) < 0.9
    spread_B1 = torch.full((responses, 1), 0.3)
    spread_B1[2] = 6.0
    advantages_B = normal(responses)
    advantages_B[3] = 0.0
    found = ObjectiveInputs(
        old_BL + spread_B1 * normal(responses, LONGEST),
        old_BL,
        advantages_B,
        mask_BL,
        old_BL + 0.4 * normal(responses, LONGEST),
        None,
        normal(responses, LONGEST).abs(),
        old_BL + 0.5 * normal(responses, LONGEST),
    )
    found.logprobs_BL.requires_grad_()
    assert found.entropy_BL is not None
    found.entropy_BL.requires_grad_()
    return found, BatchTotals(responses, int(mask_BL.sum()), LONGEST)


def assert_alike(mine: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=CLOSE, abs=1e-12)
    pairs = zip(*(torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (mine, theirs)), strict=True)
    for found, expected in pairs:
        if found is None or expected is None:
            assert found is None or not found.any()
            assert expected is None or not expected.any()
            continue
        assert float((found - expected).norm()) <= CLOSE * float(expected.norm()) + 1e-14


OBJECTIVES = {
    "grpo": (Objective(Clip(0.2, 0.2)), {"loss_type": "grpo"}),
    "grpo, limits of ten": (Objective(Clip(10.0, 10.0)), {"loss_type": "grpo"}),
    "dapo": (Objective(Clip(0.2, 0.28), aggregation="token_mean"), {"loss_type": "dapo"}),
    "dr_grpo": (Objective(Clip(0.2, 0.2), aggregation="constant"), {"loss_type": "dr_grpo", "longest": LONGEST}),
    "gspo": (Objective(Clip(3e-4, 4e-4), "gspo"), {"loss_type": "grpo", "level": "sequence"}),
    "gspo, wide": (Objective(Clip(0.5, 0.5), "gspo"), {"loss_type": "grpo", "level": "sequence"}),
    "gspo, token mean": (Objective(Clip(0.5, 0.5), "gspo", "token_mean"), {"loss_type": "dapo", "level": "sequence"}),
    "cispo": (Objective(Clip(1.0, 4.0), "cispo", "token_mean"), {"loss_type": "cispo"}),
    "on_policy": (Objective(Clip(0.2, 0.2), "on_policy"), {"loss_type": "grpo"}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.04])
def test_loss_and_gradient_are_trls(name, kl_coefficient):
    objective, settings = OBJECTIVES[name]
    for seed in SEEDS:
        responses, totals = drawn(seed)
        mine, _ = replace(objective, kl_coefficient=kl_coefficient).loss(responses, totals)
        theirs = trl_policy_loss(
            responses.logprobs_BL,
            None if objective.term == "on_policy" else responses.old_logprobs_BL,
            responses.advantages,
            responses.mask_BL,
            low=objective.clip.low,
            high=objective.clip.high,
            reference_logprobs_BL=responses.reference_logprobs_BL,
            beta=kl_coefficient,
            **settings,
        )
        assert_alike(mine, theirs, [responses.logprobs_BL])


@pytest.mark.parametrize("kind", ["truncated", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrections_are_trls(kind, level):
    """TRL takes the weights in a method that samples too, so that they are written out here."""
    for seed in SEEDS:
        responses, totals = drawn(seed)
        gap_BU = (responses.old_logprobs_BL - responses.rollout_logprobs_BL) * responses.mask_BL
        ratio_BU = (gap_BU.sum(-1, keepdim=True) if level == "sequence" else gap_BU).exp()
        if kind == "truncated":
            weights_BU = ratio_BU.clamp(max=1.5)
        else:
            weights_BU = ratio_BU.masked_fill((ratio_BU < 0.5) | (ratio_BU > 1.5), 0.0)
        clip_range = ClipRange(0.0 if kind == "truncated" else 0.5, 1.5)
        objective = Objective(
            Clip(0.2, 0.2), kl_coefficient=0.04, importance_sampling=ImportanceSampling(kind, level, clip_range)
        )
        mine, metrics = objective.loss(responses, totals)
        theirs = trl_policy_loss(
            responses.logprobs_BL,
            responses.old_logprobs_BL,
            responses.advantages,
            responses.mask_BL,
            loss_type="grpo",
            low=0.2,
            high=0.2,
            reference_logprobs_BL=responses.reference_logprobs_BL,
            beta=0.04,
            correction_BU=weights_BU,
        )
        assert_alike(mine, theirs, [responses.logprobs_BL])
        assert 0 < metrics["mismatch/importance_weight_clipped"] < 1


def test_the_entropy_bonus_is_trls_where_tokens_count_alike():
    for seed in SEEDS:
        responses, totals = drawn(seed)
        objective = Objective(Clip(0.2, 0.28), aggregation="token_mean", entropy_coefficient=0.1)
        mine, _ = objective.loss(responses, totals)
        theirs = trl_policy_loss(
            responses.logprobs_BL,
            responses.old_logprobs_BL,
            responses.advantages,
            responses.mask_BL,
            loss_type="dapo",
            low=0.2,
            high=0.28,
            entropy_BL=responses.entropy_BL,
            entropy_coefficient=0.1,
        )
        assert_alike(mine, theirs, [responses.logprobs_BL, responses.entropy_BL])


def test_advantages_of_tokens_are_trls():
    responses, totals = drawn(0)
    responses = replace(responses, advantages=torch.randn(8, LONGEST, dtype=torch.float64))
    mine, _ = Objective(Clip(0.2, 0.2)).loss(responses, totals)
    theirs = trl_policy_loss(
        responses.logprobs_BL, responses.old_logprobs_BL, responses.advantages, responses.mask_BL,
        loss_type="grpo", low=0.2, high=0.2,
    )  # fmt: skip
    assert_alike(mine, theirs, [responses.logprobs_BL])


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_direct_preference_optimization_is_trls(beta):
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        chosen, rejected, *reference = (
            -torch.randn(5, 7, dtype=torch.float64, generator=generator).abs() for _ in range(4)
        )
        masks = [torch.rand(5, 7, generator=generator) < 0.7 for _ in range(2)]
        masks[0][0] = False
        inputs = [chosen.requires_grad_(), rejected.requires_grad_()]
        mine, metrics = dpo_loss(
            *(response_logprob(values, mask) for values, mask in zip(inputs, masks, strict=True)),
            *(response_logprob(values, mask) for values, mask in zip(reference, masks, strict=True)),
            beta=beta,
        )
        theirs = trl_dpo_loss(
            *(values * mask for values, mask in zip(inputs, masks, strict=True)),
            tuple(values * mask for values, mask in zip(reference, masks, strict=True)),
            beta,
        )
        assert_alike(mine, theirs, inputs)
        assert metrics["train/margin"].item() == pytest.approx(
            (metrics["train/chosen_reward"] - metrics["train/rejected_reward"]).item()
        )


PRESETS = {
    "grpo": Objective(Clip(0.2, 0.2), kl_coefficient=1e-3),
    "grpo_sequence": Objective(Clip(0.2, 0.2), "grpo_sequence", kl_coefficient=1e-3),
    "r1": Objective(Clip(10.0, 10.0), kl_coefficient=1e-3),
    "r1_zero": Objective(Clip(0.2, 0.2), kl_coefficient=1e-3),
    "on_policy": Objective(Clip(0.2, 0.2), "on_policy", kl_coefficient=1e-3),
    "dr_grpo": Objective(Clip(0.2, 0.2), aggregation="constant"),
    "dapo": Objective(Clip(0.2, 0.28), aggregation="token_mean"),
    "gspo": Objective(Clip(3e-4, 4e-4), "gspo"),
    "cispo": Objective(Clip(1.0, 4.0), "cispo", "token_mean"),
    "truncated_is": Objective(
        Clip(0.2, 0.2),
        kl_coefficient=1e-3,
        importance_sampling=ImportanceSampling("truncated", "token", ClipRange(0.0, 2.0)),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_objectives(name):
    config = load("grpo", [f"rl={name}", "init.from=somewhere"]).rl
    assert build_objective(config, build_kl_penalty(config).loss_coefficient) == PRESETS[name]
    assert config.advantage_std == ("none" if name == "dr_grpo" else "population")
