"""Cold-start data of the generated world: problems answered with care, in tags, in the language of the question.

DeepSeek-R1 report, section 2.3.1: a few thousand long and readable answers, so that reinforcement learning does not
begin with a model that mixes languages and leaves tags open.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from megatron_r1.config.data import DataConfig
from megatron_r1.data.arithmetic import Problem, answer, draw_problem
from megatron_r1.data.chat.rows import Conversation
from megatron_r1.data.prompts import heldout_problems


def worked_conversations(config: DataConfig, count: int) -> Iterator[Conversation]:
    """Training problems with their answers; no held-out expression is among them."""
    rng = random.Random(f"worked {config.seed}")
    for _ in range(count):
        yield _conversation(draw_problem(rng, config), rng)


def heldout_conversations(config: DataConfig, count: int) -> Iterator[Conversation]:
    """The first `count` held-out problems with their answers, whatever the config's seed."""
    rng = random.Random("worked held-out")
    for problem in heldout_problems(config, count):
        yield _conversation(problem, rng)


def _conversation(problem: Problem, rng: random.Random) -> Conversation:
    text, _ = answer(problem, "careful", "think", problem.language, rng)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": text}]
