"""A worker that compares answers as mathematics: `python -m megatron_r1.rewards.math_worker SECONDS`.

Reads {"truth": TEXT, "answer": TEXT} a line. math-verify is asked in the main thread of a process of its own: its own
time limits work nowhere else, and some answers (`10^{10^{10^{10}}}`) would never come back.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_r1.lifeline import die_with_parent
from megatron_r1.rewards.worker_main import serve


def expression(text: str) -> list[Any]:
    """The whole text as one expression, in the forms that math-verify makes of it."""
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found: list[Any] = parse(f"\\boxed{{{text}}}", [config], parsing_timeout=None)
    return found


def judge(item: dict[str, Any]) -> bool:
    from math_verify import verify

    return bool(verify(expression(item["truth"]), expression(item["answer"]), timeout_seconds=None))


if __name__ == "__main__":
    die_with_parent()
    judge({"truth": "1", "answer": "1"})  # imports, and compiles what is compiled at first use
    serve(judge, float(sys.argv[1]))
