"""A response cut into its reasoning and its summary.

Helpfulness is judged on the summary alone, so that the reasoning stays free; harmlessness on the whole response
(DeepSeek-R1 report, section 2.3.4).
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_r1.rewards.extract import CLOSE, OPEN
from megatron_r1.rewards.format import END_THINK, THINK


class Parts(NamedTuple):
    """What a response is made of."""

    reasoning: str
    summary: str


def parts(response: str) -> Parts:
    """Cut where the reasoning ends, at the last closing tag; white space stays as it is.

    A summary in answer tags is what stands inside the last of them. Reasoning that is never closed has no summary. A
    response without think tags is all summary.
    """
    reasoning, closed, rest = response.rpartition(END_THINK)
    if not closed:
        before, opened, reasoning = response.partition(THINK)
        if opened:
            return Parts(before + reasoning, "")
        reasoning, rest = "", response
    _, tagged, inside = rest.rpartition(OPEN)
    return Parts(reasoning.replace(THINK, "", 1), inside.split(CLOSE, 1)[0] if tagged else rest)


def summary(response: str) -> str:
    """What helpfulness reads."""
    return parts(response).summary


def whole(response: str) -> str:
    """What harmlessness reads."""
    return response


READS = {"summary": summary, "response": whole}
