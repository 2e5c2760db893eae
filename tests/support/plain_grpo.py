"""GRPO's loss written out token by token (DeepSeekMath, equation 3), over the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def response_log_probs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float):
    """Log-probability of each response token, [L], by a forward pass of one rank over this response alone."""
    from megatron_r1.model.build import without_multi_token_prediction

    tokens = torch.tensor([[*map(int, prompt), *map(int, response)]])
    with without_multi_token_prediction(model):
        logits_LV = model(tokens, torch.arange(tokens.shape[1])[None], None)[0]
    log_probs_LV = (logits_LV / temperature).log_softmax(-1)
    return log_probs_LV[len(prompt) - 1 : -1].gather(-1, tokens[0, len(prompt) :, None])[:, 0]


def plain_loss(
    model: Any,
    reference: Any,
    samples: Sequence[Any],
    temperature: float,
    epsilon: float,
    kl_coefficient: float,
    replaying: Callable[[Any], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """The loss of one mini-batch: means over each response's tokens, then over responses; population deviation.

    `telling` gives what must hold while the model, not the reference, reads a sample.
    """
    total = torch.zeros(())
    for sample in samples:
        advantages = plain_advantages(sample, [s for s in samples if s.group == sample.group])
        with replaying(sample):
            log_probs = response_log_probs(model, sample.response.prompt_tokens, sample.response.tokens, temperature)
        with torch.no_grad():
            others = response_log_probs(reference, sample.response.prompt_tokens, sample.response.tokens, temperature)
        for token, old in enumerate(sample.response.logprobs.tolist()):
            ratio = (log_probs[token] - old).exp()
            limited = ratio.clamp(1 - epsilon, 1 + epsilon)
            gap = others[token] - log_probs[token]
            penalty = gap.exp() - gap - 1
            gain = torch.minimum(ratio * advantages[token], limited * advantages[token]) - kl_coefficient * penalty
            total = total - gain / sample.response_length / len(samples)
    return total


def plain_advantages(sample: Any, group: Sequence[Any]) -> list[float]:
    """Of each token of an response: that of the response, or with steps the sum over those that end at it or later.

    The response's reward is that of a step that ends with it.
    """
    rewards = [reward for member in group for reward in (*(value for _, value in member.steps), member.reward)]
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    steps = [*sample.steps, (sample.response_length - 1, sample.reward)]
    return [
        sum((reward - mean) / deviation for end, reward in steps if end >= token) if deviation else 0.0
        for token in range(sample.response_length)
    ]
