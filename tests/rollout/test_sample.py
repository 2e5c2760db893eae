"""Records that the trainer may rely on: what cannot be trained on cannot be built."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_r1.rollout.engine import Completion, int32
from tests.support.samples import make_response, make_sample

RESPONSE = make_response((1, 2), (3, 4), (-0.5, -0.25))
COMPLETION = Completion("a", RESPONSE, "stop", "v1")
SAMPLE = make_sample(prompt_tokens=(1, 2), response_tokens=(3, 4), reward=1.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": (3,)}, "1 response tokens but 2 log-probs"),
        ({"logprobs": (-0.5, math.nan)}, "log-prob nan at response token 1"),
        ({"logprobs": (-math.inf, -0.5)}, "log-prob -inf at response token 0"),
        ({"logprobs": (0.5, -0.5)}, "log-prob 0.5 at response token 0"),
        ({"logprobs": (-0.5, -1e300)}, "log-prob -inf at response token 1"),
        ({"tokens": (), "logprobs": ()}, "no tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_response_that_cannot_be_trained_on_is_not_built(change, told):
    numbers = {"prompt": (1, 2), "tokens": (3, 4), "logprobs": (-0.5, -0.25), **change}
    with pytest.raises(ValueError, match=told):
        make_response(**numbers)


@pytest.mark.parametrize("tokens", [(3, 0.5), ("3", "4"), (3, 2**31), (3, 2**70), (3, None), ((1, 2),), 5])
def test_tokens_are_integers_of_32_bits(tokens):
    with pytest.raises(ValueError, match="must be integers of 32 bits"):
        int32(tokens)
    assert int32(()).dtype == int32((1, 2**31 - 1)).dtype == np.int32


@pytest.mark.parametrize("record", [COMPLETION, SAMPLE])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"finish_reason": "abort"}, "finish reason 'abort'"),
        ({"version_changes": ((2, "v2"),)}, "must ascend between 1 and 1"),
    ],
)
def test_record_of_a_response_that_did_not_end_so_is_refused(record, change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(record, **change)


def test_reward_must_be_finite():
    with pytest.raises(ValueError, match="reward nan"):
        dataclasses.replace(SAMPLE, reward=math.nan)


def test_lengths_must_be_those_of_the_response():
    with pytest.raises(ValueError, match=r"of \(2, 2\) tokens: must be \(3, 2\)"):
        dataclasses.replace(SAMPLE, prompt_length=3)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAMPLE.reward = 2.0


def test_responses_are_equal_where_all_their_numbers_are():
    experts = np.zeros((3, 1, 1), np.uint8)
    names = "prompt_tokens", "tokens", "logprobs"
    others = [{name: getattr(RESPONSE, name) + 1 - 1.5 * (name == "logprobs")} for name in names]
    others.append({"routed_experts": experts})
    assert dataclasses.replace(RESPONSE) == RESPONSE != (1, 2)
    assert all(dataclasses.replace(RESPONSE, **other) != RESPONSE for other in others)
    recorded = dataclasses.replace(RESPONSE, routed_experts=experts)
    assert recorded == dataclasses.replace(RESPONSE, routed_experts=experts.copy())
    assert recorded != dataclasses.replace(RESPONSE, routed_experts=experts + 1)
