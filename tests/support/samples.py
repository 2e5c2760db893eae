"""Builders of scored responses: a valid `Sample`, of which a test names only what it is about; and their readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_r1.rollout.engine import Completion, Response, int32
from megatron_r1.rollout.sample import Sample


def make_response(
    prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float], experts: np.ndarray | None = None
) -> Response:
    return Response(int32(prompt), int32(tokens), np.array(logprobs, np.float32), experts)


def make_sample(**changes: Any) -> Sample:
    """One prompt token, one response token, reward 0; log-probabilities are -0.5 for each response token.

    Args:
        changes: fields of `Sample` or, in place of its response, of `Response`, whose tokens are `response_tokens`.
    """
    prompt, tokens = changes.pop("prompt_tokens", (1,)), changes.pop("response_tokens", (2,))
    logprobs, experts = changes.pop("logprobs", (-0.5,) * len(tokens)), changes.pop("routed_experts", None)
    fields: dict[str, Any] = {
        "prompt_id": "p",
        "group": 0,
        "prompt_length": len(prompt),
        "response_length": len(tokens),
        "weight_version": "0",
        "finish_reason": "stop",
        "reward": 0.0,
        "reward_parts": {},
        "response": changes.get("response") or make_response(prompt, tokens, logprobs, experts),
        **changes,
    }
    return Sample(**fields)


def sample_of(completion: Completion, **changes: Any) -> Sample:
    """A completion as a sample; its request is the prompt's name.

    Args:
        changes: fields of `Sample`.
    """
    fields: dict[str, Any] = {
        "prompt_id": completion.request_id,
        "prompt_length": len(completion.response.prompt_tokens),
        "response_length": len(completion.response.tokens),
        "response": completion.response,
        "weight_version": completion.weight_version,
        "finish_reason": completion.finish_reason,
        **changes,
    }
    return make_sample(**fields)


def prompt_of(one: Completion | Sample) -> tuple[int, ...]:
    """Tokens of the prompt."""
    return tuple(one.response.prompt_tokens.tolist())


def tokens_of(one: Completion | Sample) -> tuple[int, ...]:
    """Tokens of the response."""
    return tuple(one.response.tokens.tolist())


def logprobs_of(one: Completion | Sample) -> torch.Tensor:
    """The engine's log-probabilities, [R], in torch's default type."""
    return torch.tensor(one.response.logprobs.tolist())


def row_of(one: Completion | Sample) -> torch.Tensor:
    """Prompt and response, [1, L]."""
    return torch.tensor([prompt_of(one) + tokens_of(one)])
