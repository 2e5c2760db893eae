"""Results of one model: its scores as means over prompts, with intervals, as `results.json` holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.evaluation.behaviour import mixes_languages, reflection_words
from megatron_r1.evaluation.benchmarks import Measures
from megatron_r1.evaluation.intervals import bootstrap
from megatron_r1.evaluation.pass_at_k import cons_at_k, pass_at_k, sizes_up_to

ByPrompt = Sequence[Sequence[float]]
"""A value of each response, by prompt."""


@dataclass(frozen=True, slots=True)
class EvaluatedResponse:
    """One response, as it was sampled."""

    text: str
    tokens: int
    truncated: bool
    """Whether the length limit cut it off."""


BEHAVIOUR: Mapping[str, Callable[[EvaluatedResponse], float]] = {
    "mixed_language": lambda response: float(mixes_languages(response.text)),
    "response_length": lambda response: float(response.tokens),
    "reflection_words": lambda response: float(reflection_words(response.text)),
    "truncated": lambda response: float(response.truncated),
}


class ModeScores:
    """The responses of one mode, greedy or sampled, and their scores."""

    def __init__(
        self,
        measures: Measures,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[EvaluatedResponse]],
        openings: Sequence[str],
    ):
        """
        Args:
            responses: to each prompt, as many to all.
            openings: what each prompt already held of its responses.
        """
        self._measures, self._prompts = measures, prompts
        self.responses = responses
        self._texts = [
            [opening + response.text for response in group] for opening, group in zip(openings, responses, strict=True)
        ]
        self.scores: dict[str, ByPrompt] = {name: self._score(name) for name in measures.metrics}

    def _score(self, name: str) -> ByPrompt:
        repeated = [prompt for prompt, texts in zip(self._prompts, self._texts, strict=True) for _ in texts]
        values = iter(self._measures.metrics[name](repeated, [text for texts in self._texts for text in texts]))
        return [list(islice(values, len(texts))) for texts in self._texts]

    @property
    def main(self) -> ByPrompt:
        """The scores of the main metric."""
        return next(iter(self.scores.values()))

    def means(self) -> dict[str, Any]:
        """Mean of each metric; of a correctness, sampled, this is pass@1 averaged over the samples."""
        return intervals({name: _means(values) for name, values in self.scores.items()})

    def by_task(self) -> dict[str, Any]:
        """Mean of the main metric by task."""
        tasks = [prompt.task for prompt in self._prompts]
        means = _means(self.main)
        found = {task: [mean for mean, own in zip(means, tasks, strict=True) if own == task] for task in tasks}
        return {task: intervals({task: found[task]})[task] for task in sorted(found)}

    def behaviour(self) -> dict[str, Any]:
        """Mixing of languages, length, reflection words and truncation, whatever is correct."""
        return intervals(
            {
                name: _means([[measure(response) for response in group] for group in self.responses])
                for name, measure in BEHAVIOUR.items()
            }
        )

    def pass_at_k(self) -> dict[str, Any]:
        """Metric -> k -> pass@k."""
        return {name: self._pass_at_k(self.scores[name]) for name in self._measures.correct}

    def _pass_at_k(self, scores: ByPrompt) -> dict[str, Any]:
        samples = len(scores[0])
        rights = [int(sum(values)) for values in scores]
        return intervals({str(k): [pass_at_k(samples, right, k) for right in rights] for k in sizes_up_to(samples)})

    def cons_at_k(self) -> dict[str, Any]:
        """k -> cons@k of the main metric; empty where the benchmark's answers cannot be compared."""
        count_votes = self._measures.count_votes
        if count_votes is None:
            return {}
        votes = [
            count_votes(prompt, texts, correct)
            for prompt, texts, correct in zip(self._prompts, self._texts, self.main, strict=True)
        ]
        counted = [vote for vote in votes if vote is not None]
        if not counted:
            return {}
        return intervals({str(k): [cons_at_k(*vote, k) for vote in counted] for k in sizes_up_to(len(self.main[0]))})


def curve_of(results: Mapping[int, Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Metric -> its mean and interval at each step, of sampled responses; behaviour included."""
    curve: dict[str, list[dict[str, float]]] = {}
    for step, result in sorted(results.items()):
        for name, value in (result["sampled"] | result["behaviour"]["sampled"]).items():
            curve.setdefault(name, []).append({"step": step, **value})
    return curve


def intervals(prompt_values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Name -> {mean, low, high} of a value that each prompt has; 95 % intervals by bootstrap over prompts."""
    found = bootstrap(list(prompt_values.values()))
    return {name: interval._asdict() for name, interval in zip(prompt_values, found, strict=True)}


def _means(values: ByPrompt) -> list[float]:
    return [sum(group) / len(group) for group in values]
