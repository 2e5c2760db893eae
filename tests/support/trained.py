"""A small model trained until its distributions are sharp, and how far an engine's log-probs are from it.

The text is a walk over the vocabulary in which each token has a few successors: a model learns it in seconds, and wrong
weights then show as whole nats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.agreement import disagreement
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of

FIRST, VOCABULARY, SUCCESSORS, LENGTH = 5, 256, 4, 64
"""Ids below FIRST are special tokens."""


def walks(count: int, length: int, seed: int) -> Tensor:
    """Sequences [B, L]: after token t comes one of four tokens that t decides."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BL = torch.empty(count, length, dtype=torch.int64)
    tokens_BL[:, 0] = torch.randint(0, VOCABULARY, (count,), generator=draw)
    for place in range(1, length):
        choice_B = torch.randint(0, SUCCESSORS, (count,), generator=draw)
        tokens_BL[:, place] = (tokens_BL[:, place - 1] * 37 + choice_B * 11 + 3) % VOCABULARY
    return tokens_BL + FIRST


def train(model: Any, steps: int, device: str) -> float:
    """Train on walks; the loss of the last step, whose least possible value is log 4 = 1.39."""
    from megatron_r1.config.train import TrainConfig
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update

    optimizer = Optimizer(model, TrainConfig())
    for step in range(steps):
        rows_BL = walks(32, LENGTH + 1, step).to(device)
        result = update(model, optimizer, [rows_BL], next_token_forward, 2e-3, LENGTH)
    return float(torch.stack([one["train/loss"] for one in result.passes.logged]).mean())


@torch.no_grad()
def gap(model: Any, engine: Any, version: str, device: str) -> float:
    """How far the engine's log-probs of responses of its own are from the model's, in nats."""
    from megatron_r1.model.build import without_multi_token_prediction
    from megatron_r1.rollout.engine import Request, Sampling

    prompts = [tuple(walks(1, length, length)[0].tolist()) for length in (4, 9, 17, 30)]
    requests = [Request(str(i), prompts[i // 2]) for i in range(8)]
    model.eval()
    gaps = []
    for completion in engine.generate(requests, Sampling(1.0, 1.0, 20, (), 0)):
        assert completion.weight_version == version
        tokens_BL = row_of(completion).to(device)
        positions_BL = torch.arange(tokens_BL.shape[1], device=device)[None]
        with without_multi_token_prediction(model):
            log_probs_LV = model(tokens_BL, positions_BL, None)[0].float().log_softmax(-1)
        chosen_L = torch.tensor(tokens_of(completion), device=device)
        expected_L = log_probs_LV[len(prompt_of(completion)) - 1 : -1].gather(-1, chosen_L[:, None])[:, 0]
        gaps.append(float((expected_L.cpu() - logprobs_of(completion)).abs().max()))
    model.train()
    return disagreement(gaps)
