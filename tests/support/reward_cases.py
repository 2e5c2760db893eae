"""Labelled responses of random tokens, and one update of a reward model on them, on one rank and on several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.data.preference.examples import TokenizedPreference, TokenizedSequence
from tests.support.layouts import model_of

PAD, END = 0, 2


def training_examples(pairwise: bool, count: int = 8, reasoning: bool = True) -> list[TokenizedPreference]:
    """Sequences of many lengths; with reasoning, the last few tokens of each are in the loss."""
    generator = torch.Generator().manual_seed(3)

    def sequence() -> TokenizedSequence:
        length, critique_tokens = (
            int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((6, 24), (2, 5))
        )
        tokens = [*torch.randint(5, 512, (length - 1,), generator=generator).tolist(), END]
        return TokenizedSequence(tokens, length - critique_tokens if reasoning else length)

    return [
        TokenizedPreference(
            tuple(sequence() for _ in range(1 + pairwise)), bool(torch.rand(1, generator=generator) < 0.5)
        )
        for _ in range(count)
    ]


def one_update(
    platform: Any, parallel: ParallelConfig, pairwise: bool, critique_weight: float
) -> tuple[dict[str, float], dict[str, torch.Tensor], list[float]]:
    """Metrics of an update on eight examples, its whole gradients, and scores of sequences before the update.

    The head is not zero, so that gradients reach the whole model.
    """
    from megatron_r1.model.build import build_model
    from megatron_r1.model.reward_head import HEAD, add_reward_head
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.preference.reward_model import RewardModel
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.routing import FROZEN
    from megatron_r1.train.update import update
    from tests.dist.ranks_layouts import whole_gradients

    model = build_model(model_of("tiny"), parallel, platform, 0)
    add_reward_head(model)
    for name, parameter in model.named_parameters():
        if HEAD in name:
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(drawn * 0.1)
        parameter.requires_grad_(not name.startswith("mtp."))
    FROZEN.apply(model, 0)
    settings = TrainConfig(steps=100)
    settings.optimizer.max_grad_norm = 0.0
    optimizer = Optimizer(model, settings)
    model_with_head = RewardModel(model, pairwise, critique_weight, PAD, "cpu")
    examples, group = training_examples(pairwise), data_parallel_group()
    scores = model_with_head.scores([sequence.tokens for example in examples for sequence in example.sequences], 3)
    micro_batches = model_with_head.micro_batches(examples, dist.get_rank(group), dist.get_world_size(group), 2)
    length = max(each.inputs_BL.shape[1] for each in micro_batches)
    result = update(model, optimizer, micro_batches, model_with_head.forward, 1e-3, length)
    return logged_metrics(result) | {"norm": result.gradient_norm}, whole_gradients(model, optimizer), scores
