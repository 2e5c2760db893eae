"""An engine is not given what it could not answer."""

import dataclasses
import math

import pytest

from megatron_r1.rollout.engine import Request, Sampling


def test_request_needs_a_prompt():
    with pytest.raises(ValueError, match="request x: the prompt has no tokens"):
        Request("x", ())


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}]
)
def test_impossible_sampling_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(Sampling(1.0, 1.0, 8, (), 0), **change)
