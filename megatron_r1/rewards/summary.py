"""The part of a response that a reward model scores.

Helpfulness is scored on the summary alone, so that it does not constrain the reasoning; harmlessness on the whole
response (DeepSeek-R1 report, section 2.3.4).
"""

from __future__ import annotations

from megatron_r1.rewards.extract import last_tagged, split_reasoning


def summary(response: str) -> str:
    """The text after the reasoning; where that has answer tags, the content of the last answer element."""
    rest = split_reasoning(response).summary
    tagged = last_tagged(rest)
    return rest if tagged is None else tagged


def whole(response: str) -> str:
    """The whole response."""
    return response


READS = {"summary": summary, "response": whole}
"""Value of `reward_model.scored_part` -> function that extracts the part."""
