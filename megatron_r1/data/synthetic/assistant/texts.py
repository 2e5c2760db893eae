"""Data of the assistant world: documents, conversations, prompts, preference pairs, safety examples.

Each is addressed by index and depends on the config's seed and that index alone. No training text contains a held-out
question; held-out data do not depend on the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_r1.config.data import DataConfig
from megatron_r1.data.preference_example import LabelledResponse, PreferenceExample
from megatron_r1.data.synthetic.arithmetic import Shares
from megatron_r1.data.synthetic.arithmetic import documents as arithmetic_documents
from megatron_r1.data.synthetic.assistant.lexicon import spaced
from megatron_r1.data.synthetic.assistant.tasks import (
    AGREES,
    DECLINES,
    PLANS,
    TASKS,
    THOUGHTS,
    WEIGHS,
    Task,
    bad_answer,
    draw_from,
    good_answer,
)
from megatron_r1.data.template import fill_template
from megatron_r1.errors import DataError

GOOD_SHARE = 0.75
"""Share of documents with a good answer; the others leave reinforcement learning something to improve."""
CRITIQUE_SHARE = 0.15
"""Share of documents with a critique after the response."""
TEMPLATE_SHARE = 0.7
"""Share of documents with the R1-Zero template around the question; the others have the bare question."""
MOST_DRAWS = 100
"""Draws without a new held-out question after which the split counts as exhausted."""
STYLES = Shares({"think": 0.5, "tagged": 0.2, "plain": 0.3})
"""Format of a response: reasoning and answer in tags, the answer alone in tags, or no tags."""
JUDGEMENT = "\nJudge:{} {}"
UNSAFE_SHARE = 0.75
"""Share of unsafe responses among those to harmful requests."""
SAFETY_HARMFUL_SHARE = 2 / 3
"""Share of harmful requests among the safety examples; with UNSAFE_SHARE, half of all responses are unsafe."""
UNSAFE_WAYS = [(True, True), (True, False), (False, True)]
"""Whether the reasoning plans, and whether the answer agrees."""
HARMLESS_WAYS = [*UNSAFE_WAYS, (False, False)]
VERDICTS = {True: "It is good.", False: "It is bad."}


def documents(config: DataConfig) -> Iterator[str]:
    """The texts to pre-train on: general tasks, and `config.arithmetic_share` of worked arithmetic."""
    arithmetic = arithmetic_documents(config)
    for index in range(config.num_documents):
        rng = random.Random(f"assistant document {config.seed} {index}")
        if rng.random() < config.arithmetic_share:
            yield next(arithmetic)
        else:
            yield document(rng, config)


def document(rng: random.Random, config: DataConfig) -> str:
    """A training question with a response, most often a good one, and sometimes a critique of it."""
    task = draw_from(rng, False, config.eval_fraction)
    good = rng.random() < GOOD_SHARE
    response = respond(task, good, STYLES.draw(rng), rng)
    context = fill_template(task.question) if rng.random() < TEMPLATE_SHARE else f"{task.question}\n"
    if rng.random() < CRITIQUE_SHARE:
        response += critique(task, good, rng)
    return context + response


def respond(task: Task, good: bool, style: str, rng: random.Random) -> str:
    """A response with a good or a bad answer; its reasoning has the same form in both cases."""
    answer = good_answer(task, rng) if good else bad_answer(task, rng)
    if style == "plain":
        return answer
    if style == "tagged":
        return f"<answer>{answer}</answer>"
    thought = THOUGHTS.get(task.name)
    if thought is None:
        careful = good if task.harmful else rng.random() < 0.5
        thought = (WEIGHS if careful else PLANS).format(spaced(task.words))
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def critique(task: Task, good: bool, rng: random.Random) -> str:
    """A labeller's reasoning about a response: a correct answer, and whether the response's answer is good."""
    return JUDGEMENT.format(good_answer(task, rng), VERDICTS[good])


def conversations(config: DataConfig, count: int, evaluation: bool = False) -> Iterator[list[dict[str, str]]]:
    """Questions with good responses in tags, as messages of a user and an assistant."""
    for rng, task in _tasks(config, "conversation", count, evaluation):
        answer = respond(task, True, "think", rng)
        yield [{"role": "user", "content": task.question}, {"role": "assistant", "content": answer}]


class SyntheticPrompt(NamedTuple):
    """A question for reinforcement learning."""

    task: str
    question: str
    answer: str
    """A good answer, of which there may be others."""


def synthetic_prompts(
    config: DataConfig, count: int, evaluation: bool = False, start: int = 0
) -> Iterator[SyntheticPrompt]:
    """Questions `start` to `start + count - 1` for reinforcement learning, or for its evaluation.

    Evaluation questions are all different.
    """
    for rng, task in _tasks(config, "prompt", count, evaluation, start):
        yield SyntheticPrompt(task.name, task.question, good_answer(task, rng).strip())


def preference_pairs(config: DataConfig, count: int, evaluation: bool = False) -> Iterator[PreferenceExample]:
    """Two responses to a question, in the same form and with the same number of tokens: chosen has the good answer."""
    for rng, task in _tasks(config, "pair", count, evaluation):
        style = STYLES.draw(rng)
        chosen, rejected = (
            LabelledResponse(task.question, respond(task, good, style, rng), critique(task, good, rng))
            for good in (True, False)
        )
        yield PreferenceExample(task.name, chosen, rejected)


def safety_items(config: DataConfig, count: int, evaluation: bool = False) -> Iterator[PreferenceExample]:
    """Responses to requests to make something, half of them unsafe; all have the same form.

    A response is unsafe if its reasoning, its answer or both help with something harmful.
    """
    for rng, task in _tasks(config, "safety", count, evaluation, names=("make",)):
        unsafe = task.harmful and rng.random() < UNSAFE_SHARE
        ways = UNSAFE_WAYS if unsafe else HARMLESS_WAYS if not task.harmful else [(False, False)]
        plans, agrees = rng.choice(ways)
        words = spaced(task.words)
        thought, answer = (PLANS if plans else WEIGHS).format(words), (AGREES if agrees else DECLINES).format(words)
        response = f"<think>{thought}</think> <answer>{answer}</answer>"
        reasoning = JUDGEMENT.format((AGREES if unsafe else DECLINES).format(words), VERDICTS[not unsafe])
        yield PreferenceExample(task.name, LabelledResponse(task.question, response, reasoning), safe=not unsafe)


def _tasks(
    config: DataConfig, use: str, count: int, evaluation: bool, start: int = 0, names: tuple[str, ...] = TASKS
) -> Iterator[tuple[random.Random, Task]]:
    """A random generator and a task for each index; no two evaluation tasks have the same question."""
    questions: set[str] = set()
    harmful_share = SAFETY_HARMFUL_SHARE if use == "safety" else 0.5
    for index in range(start, start + count):
        rng = random.Random(f"assistant {use} {'held-out' if evaluation else config.seed} {index}")
        for _ in range(MOST_DRAWS):
            task = draw_from(rng, evaluation, config.eval_fraction, names, harmful_share)
            if not evaluation or task.question not in questions:
                break
        else:
            raise DataError(f"{use} {index}: eval_fraction={config.eval_fraction} holds out too few questions")
        questions.add(task.question)
        yield rng, task


SOURCES: dict[str, Callable[[DataConfig, int, bool], Iterator[PreferenceExample]]] = {
    "pairwise": preference_pairs,
    "pointwise": safety_items,
}
"""Objective of a reward model -> its training examples in this world."""
