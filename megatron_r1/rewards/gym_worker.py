"""A worker that asks reasoning-gym's verifiers: `python -m megatron_r1.rewards.gym_worker SECONDS`.

Reads {"task": NAME, "answer": TEXT, "entry": JSON} a line.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

from megatron_r1.lifeline import die_with_parent
from megatron_r1.rewards.worker_main import serve


@cache
def scorer(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def judge(item: dict[str, Any]) -> bool:
    return bool(scorer(item["task"])(item["answer"], json.loads(item["entry"])) == 1.0)


if __name__ == "__main__":
    die_with_parent()
    import reasoning_gym  # noqa: F401  slow to import: before it says that it can work

    serve(judge, float(sys.argv[1]))
