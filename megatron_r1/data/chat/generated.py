"""Conversations of the generated worlds: problems with careful solutions, and general tasks with good responses.

Worked problems are cold-start data (DeepSeek-R1 report, section 2.3.1): a few thousand long and readable responses, so
that reinforcement learning does not start from a model that mixes languages and leaves tags open. Together with
general tasks they stand for the mixture of the later fine-tuning (section 2.3.3).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.rows import Conversation
from megatron_r1.data.prompts.prompts import eval_problems
from megatron_r1.data.synthetic.arithmetic import Problem, draw_problem, write_response
from megatron_r1.data.synthetic.assistant import texts

Conversations = Callable[[DataConfig, int], Iterator[Conversation]]


class GeneratedConversations(NamedTuple):
    """Two functions of a generated world, each from a config and a count to that many conversations."""

    training: Conversations
    """For training: they depend on the config's seed and contain no held-out question."""
    evaluation: Conversations
    """For evaluation: held-out questions, the same for every seed."""


def worked_conversations(config: DataConfig, count: int) -> Iterator[Conversation]:
    """Training problems with worked responses; no held-out expression is among them."""
    rng = random.Random(f"worked {config.seed}")
    for _ in range(count):
        yield _conversation(draw_problem(rng, config), rng)


def eval_conversations(config: DataConfig, count: int) -> Iterator[Conversation]:
    """The first `count` held-out problems with worked responses, the same for every seed."""
    rng = random.Random("worked held-out")
    for problem in eval_problems(config, count):
        yield _conversation(problem, rng)


def _conversation(problem: Problem, rng: random.Random) -> Conversation:
    text, _ = write_response(problem, "careful", "think", problem.language, rng)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": text}]


def mixed_conversations(config: DataConfig, count: int) -> Iterator[Conversation]:
    """General tasks, mixed with a share `config.arithmetic_share` of worked problems."""
    general = texts.conversations(config, count)
    return _mixed(config, count, f"mixed {config.seed}", general, worked_conversations(config, count))


def eval_mixed_conversations(config: DataConfig, count: int) -> Iterator[Conversation]:
    """Held-out questions of both kinds, in the same shares."""
    general = texts.conversations(config, count, evaluation=True)
    return _mixed(config, count, "mixed held-out", general, eval_conversations(config, count))


def _mixed(
    config: DataConfig, count: int, seed: str, general: Iterator[Conversation], worked: Iterator[Conversation]
) -> Iterator[Conversation]:
    rng = random.Random(seed)
    for _ in range(count):
        yield next(worked if rng.random() < config.arithmetic_share else general)


GENERATED = {
    "arithmetic": GeneratedConversations(worked_conversations, eval_conversations),
    "assistant": GeneratedConversations(mixed_conversations, eval_mixed_conversations),
}
