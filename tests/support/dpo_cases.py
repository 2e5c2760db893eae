"""Preference pairs of random tokens, one update of direct preference optimization on them, and its loss written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.data.preference.examples import TokenizedPreference, TokenizedSequence
from tests.support.float64 import DTYPE
from tests.support.layouts import model_of
from tests.support.plain_grpo import response_log_probs

PAD, END = 0, 2
BETA, SMOOTHING = 0.3, 0.1
REFERENCE_SCALE = 1.02
"""Of the reference's weights to the policy's, so that no margin is 0."""


def tiny() -> ModelConfig:
    """The tiny shape in float64; for use inside `float64()`."""
    config = model_of("tiny")
    config.dtype = DTYPE
    return config


def pairs(count: int = 8) -> list[TokenizedPreference]:
    """Two responses of many lengths to each prompt."""
    generator = torch.Generator().manual_seed(5)

    def drawn(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(5, 512, (length,), generator=generator).tolist()

    def pair() -> TokenizedPreference:
        prompt = drawn(3, 12)
        return TokenizedPreference(
            tuple(TokenizedSequence([*prompt, *drawn(1, 16), END], len(prompt)) for _ in range(2)), True
        )

    return [pair() for _ in range(count)]


def plain_gaps(model: Any, examples: Sequence[TokenizedPreference]) -> torch.Tensor:
    """log p(better response) - log p(the other) of each pair, token by token over the whole vocabulary."""
    gaps = []
    for example in examples:
        chosen, rejected = (
            response_log_probs(
                model, tuple(row.tokens[: row.loss_start]), tuple(row.tokens[row.loss_start :]), 1.0
            ).sum()
            for row in example.sequences
        )
        gaps.append(chosen - rejected)
    return torch.stack(gaps)


def plain_loss(model: Any, reference: Any, examples: Sequence[TokenizedPreference]) -> torch.Tensor:
    """The mean over pairs of the conservative loss (Mitchell 2023, equation 3)."""
    with torch.no_grad():
        before = plain_gaps(reference, examples)
    right = torch.sigmoid(BETA * (plain_gaps(model, examples) - before))
    return -((1 - SMOOTHING) * right.log() + SMOOTHING * (1 - right).log()).mean()


def one_update(
    platform: Any, parallel: ParallelConfig, size: int = 2
) -> tuple[dict[str, float], dict[str, torch.Tensor], list[float]]:
    """Metrics of an update on eight pairs, its whole gradients, and the margins of five pairs before it.

    Five pairs cannot be divided among ranks evenly.
    """
    from megatron_r1.model.build import build_model
    from megatron_r1.preference.dpo import DirectPreference, EvalPairs
    from megatron_r1.rl.policy.reference import ReferencePolicy
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.routing import FROZEN
    from tests.dist.ranks_layouts import whole_gradients

    model = build_model(tiny(), parallel, platform, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("mtp."))
    FROZEN.apply(model, 0)
    settings = TrainConfig(steps=100)
    settings.optimizer.max_grad_norm = 0.0
    optimizer, reference = Optimizer(model, settings), ReferencePolicy(model)
    for weight in reference.copies:
        weight *= REFERENCE_SCALE
    this = DirectPreference(model, reference, BETA, SMOOTHING, PAD, "cpu")
    margins = EvalPairs(this, pairs(5), 2).margins()
    result, positions = this.learn(optimizer, pairs(), 1e-3, size)
    assert positions > 0 and not result.skipped
    return logged_metrics(result) | {"norm": result.gradient_norm}, whole_gradients(model, optimizer), margins
