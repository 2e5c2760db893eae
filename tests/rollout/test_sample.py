"""Records that the trainer may rely on: what cannot be trained on cannot be built."""

import dataclasses
import math

import pytest

from megatron_r1.rollout.engine import Completion
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.sample import Sample
from tests.support.samples import make_sample

COMPLETION = Completion("a", (1, 2), (3, 4), (-0.5, -0.25), "stop", "v1")
SAMPLE = make_sample(prompt_tokens=(1, 2), response_tokens=(3, 4), reward=1.0)


@pytest.mark.parametrize("record", [COMPLETION, SAMPLE])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"response_tokens": (3,)}, "1 response tokens but 2 log-probs"),
        ({"logprobs": (-0.5, math.nan)}, "log-prob nan at response token 1"),
        ({"logprobs": (-math.inf, -0.5)}, "log-prob -inf at response token 0"),
        ({"logprobs": (0.5, -0.5)}, "log-prob 0.5 at response token 0"),
        ({"response_tokens": (), "logprobs": ()}, "no tokens"),
        ({"finish_reason": "abort"}, "finish reason 'abort'"),
    ],
)
def test_response_that_cannot_be_trained_on_is_refused(record, change, told, tmp_path):
    """A completion is not built; a sample is not built or, for its log-probs, not journaled, so not trained on."""
    with pytest.raises(ValueError, match=told):
        changed = dataclasses.replace(record, **change)
        assert isinstance(changed, Sample), "the completion was built"
        Journal(tmp_path).write(0, [changed])


def test_reward_must_be_finite():
    with pytest.raises(ValueError, match="reward nan"):
        dataclasses.replace(SAMPLE, reward=math.nan)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAMPLE.reward = 2.0
