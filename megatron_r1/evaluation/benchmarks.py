"""Benchmarks: held-out prompts of each generated world or prompts of a file, and metrics of the responses to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from megatron_r1.config.data import DataConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.prompts import Prompt, eval_assistant_prompts, eval_prompts
from megatron_r1.data.synthetic.assistant.hidden_rules import verdict
from megatron_r1.errors import UserError
from megatron_r1.evaluation.voting import Votes, count_votes
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.format import format_reward
from megatron_r1.rewards.language import LanguageReward
from megatron_r1.rewards.reward import Unscored

Metric = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""Prompts and responses -> value of each response, from 0 to 1."""
CountVotes = Callable[[Prompt, Sequence[str], Sequence[float]], Votes | None]
"""A prompt, responses and which of them are correct -> votes for each answer; None where answers cannot be compared."""


class Measures(NamedTuple):
    """What is measured of each response."""

    metrics: Mapping[str, Metric]
    """By name; the first is the main metric."""
    correct: tuple[str, ...]
    """Metrics that say whether a response is correct: these have a pass@k."""
    count_votes: CountVotes | None = None
    """For cons@k; the responses that the main metric finds correct vote for the true answer."""


class Benchmark(NamedTuple):
    """Prompts and measures."""

    prompts: Callable[[DataConfig, int], list[Prompt]]
    """Config and number -> that many held-out prompts."""
    measures: Callable[[RewardConfig], AbstractContextManager[Measures]]
    """Context of the measures, which may start worker processes."""


def well_formed(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """1 for each response with the strict format."""
    return [format_reward(text, "strict") for text in texts]


@contextmanager
def accuracy_measures(config: RewardConfig) -> Iterator[Measures]:
    """Correct in any format, correct inside well-formed tags, well-formed tags; as training verifies answers.

    And the share of the reasoning's words that are in the target language, of which the language reward is made.
    """
    with (
        closing(Accuracy(replace(config, answer_format="any"))) as anywhere,
        closing(Accuracy(replace(config, answer_format="tags"))) as tagged,
    ):

        def correct_tagged(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
            pairs = zip(well_formed(prompts, texts), verified(tagged, prompts, texts), strict=True)
            return [formed * correct for formed, correct in pairs]

        metrics: dict[str, Metric] = {
            "correct_any_format": lambda prompts, texts: verified(anywhere, prompts, texts),
            "correct_tagged": correct_tagged,
            "format": well_formed,
            "language": LanguageReward(config.target_language).score,
        }
        yield Measures(metrics, ("correct_any_format", "correct_tagged"), partial(count_votes, anywhere))


def verified(accuracy: Accuracy, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """1 for each response that is correct as a whole: of a program, one that passes all of its tests.

    Raises:
        UserError: one could not be verified, for no fault of its own.
    """
    values = []
    for value in accuracy.score(prompts, texts):
        if isinstance(value, Unscored):
            raise UserError(f"a response could not be verified: {value.reason}")
        values.append(float(value == 1.0))
    return values


@contextmanager
def assistant_measures(config: RewardConfig) -> Iterator[Measures]:
    """Helpful, safe and well-formed, by the hidden rules of the assistant world."""
    metrics: dict[str, Metric] = {
        "helpful": lambda prompts, texts: [
            float(verdict(prompt.question, text).helpful) for prompt, text in zip(prompts, texts, strict=True)
        ],
        "safe": lambda prompts, texts: [
            float(verdict(prompt.question, text).safe) for prompt, text in zip(prompts, texts, strict=True)
        ],
        "format": well_formed,
    }
    yield Measures(metrics, ("helpful",))


BENCHMARKS: Mapping[str, Benchmark] = {
    "arithmetic": Benchmark(eval_prompts, accuracy_measures),
    "assistant": Benchmark(eval_assistant_prompts, assistant_measures),
}
"""arithmetic: correct in any format, correct inside well-formed tags, well-formed tags. assistant, by the hidden rules:
helpful (does what the question asks for, or declines a harmful request), safe, well-formed tags."""
