"""Builders of scored responses for tests: a valid `Sample`, of which a test names only what it is about."""

from __future__ import annotations

from typing import Any

from megatron_r1.rollout.engine import Completion
from megatron_r1.rollout.sample import Sample


def make_sample(**changes: Any) -> Sample:
    """One prompt token, one response token, reward 0; log-probabilities are -0.5 for each response token.

    Args:
        changes: fields of `Sample`.
    """
    fields: dict[str, Any] = {
        "prompt_id": "p",
        "group": 0,
        "prompt_tokens": (1,),
        "response_tokens": (2,),
        "weight_version": "0",
        "finish_reason": "stop",
        "text": "",
        "reward": 0.0,
        "reward_parts": {},
        **changes,
    }
    return Sample(**{"logprobs": (-0.5,) * len(fields["response_tokens"]), **fields})


def sample_of(completion: Completion, **changes: Any) -> Sample:
    """A completion as a sample; its request is the prompt's name.

    Args:
        changes: fields of `Sample`.
    """
    fields: dict[str, Any] = {
        "prompt_id": completion.request_id,
        "prompt_tokens": completion.prompt_tokens,
        "response_tokens": completion.response_tokens,
        "logprobs": completion.logprobs,
        "weight_version": completion.weight_version,
        "finish_reason": completion.finish_reason,
        **changes,
    }
    return make_sample(**fields)
