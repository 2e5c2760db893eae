"""Which part of a response a reward model reads.

Helpfulness is judged on the summary alone, so that the reasoning stays free; harmlessness on the whole response
(DeepSeek-R1 report, section 2.3.4).
"""

from __future__ import annotations

from megatron_r1.rewards.extract import last_tagged, split_reasoning


def summary(response: str) -> str:
    """What follows the reasoning; where it is in answer tags, what stands inside the last of them."""
    rest = split_reasoning(response).summary
    tagged = last_tagged(rest)
    return rest if tagged is None else tagged


def whole(response: str) -> str:
    """All of a response."""
    return response


READS = {"summary": summary, "response": whole}
"""`reward_model.reads` -> which part that is."""
