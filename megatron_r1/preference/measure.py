"""Accuracy of a reward model on validation examples, and of the length baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_r1.data.preference.examples import PairEncoder, RewardModelEncoder
from megatron_r1.data.preference.length_baseline import length_baseline
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.evaluation.intervals import clustered
from megatron_r1.parallel.mesh import all_gather_data_parallel, data_parallel_group
from megatron_r1.preference.reward_model import RewardModel, pairwise_accuracy

BATCH_SIZE = 64


class EvalAccuracy:
    """Evaluates whether a reward model orders, or labels, validation examples correctly."""

    def __init__(
        self,
        model: RewardModel,
        encoder: RewardModelEncoder,
        examples: Sequence[PreferenceExample],
        max_critique_tokens: int,
    ):
        self._model, self._encoder, self._examples = model, encoder, examples
        self._max_critique_tokens = max_critique_tokens

    def __call__(self) -> dict[str, float]:
        """Accuracy with a 95 % interval, the same on every rank."""
        found = clustered(self.per_example())
        return {"eval/accuracy": found.mean, "eval/accuracy_low": found.low, "eval/accuracy_high": found.high}

    def per_example(self) -> list[float]:
        """1, 0, or 0.5 for a tie, for each example; the same on every rank. Collective.

        A model that writes critiques scores after its own critique: the labeller's would reveal the label.
        """
        scores = iter(self.scores([side for example in self._examples for side in example.responses]))
        margins = []
        for example in self._examples:
            of_sides = [next(scores) for _ in example.responses]
            margins.append(of_sides[0] - of_sides[1] if example.rejected else of_sides[0] * (2 * example.safe - 1))
        return pairwise_accuracy(torch.tensor(margins)).tolist()

    def scores(self, sides: Sequence[Any]) -> list[float]:
        return score_texts(
            self._model,
            self._encoder,
            [side.question for side in sides],
            [side.response for side in sides],
            self._max_critique_tokens,
        )


def score_texts(
    model: RewardModel,
    encoder: RewardModelEncoder,
    questions: Sequence[str],
    responses: Sequence[str],
    max_critique_tokens: int,
) -> list[float]:
    """The score of each response to its question, on every rank.

    Collective over all ranks, with the same arguments on each. Data-parallel ranks divide the responses among them.
    """
    group, end = data_parallel_group(), encoder.tokenizer.eos
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    pairs = list(zip(questions, responses, strict=True))
    sequences = [encoder.without_critique(question, response) for question, response in pairs[rank::ranks]]
    if encoder.reasoning:
        sequences = model.generate_critiques(sequences, BATCH_SIZE, end, max_critique_tokens)
    else:
        sequences = [[*tokens, end] for tokens in sequences]
    scores = [0.0] * len(pairs)
    for index, share in enumerate(all_gather_data_parallel(model.scores(sequences, BATCH_SIZE))):
        scores[index::ranks] = share
    return scores


def eval_results(
    correct: Sequence[float],
    training: Sequence[PreferenceExample],
    evaluated: Sequence[PreferenceExample],
    encoder: PairEncoder,
) -> dict[str, Any]:
    """Accuracy on validation examples, over all and by task, and of the length baselines; with 95 % intervals."""

    def tokens(text: str) -> int:
        return len(encoder.tokenizer.encode(text))

    return {
        "items": len(evaluated),
        "accuracy": clustered(correct)._asdict(),
        "by_task": {
            task: clustered(
                [one for one, example in zip(correct, evaluated, strict=True) if example.task == task]
            )._asdict()
            for task in sorted({example.task for example in evaluated})
        },
        "length_baselines": {
            name: clustered(length_baseline(training, evaluated, length))._asdict()
            for name, length in (("characters", len), ("tokens", tokens))
        },
    }


def show(results: dict[str, Any], scorer: str) -> None:
    """Print the results as a table.

    Args:
        scorer: name of what orders, or labels, the examples.
    """
    table = Table(title=f"{results['items']} held-out examples, 95 % intervals")
    table.add_column("scorer")
    table.add_column("accuracy")
    rows = {scorer: results["accuracy"]}
    rows |= {f"length alone, in {name}": value for name, value in results["length_baselines"].items()}
    rows |= {f"{scorer}, {task}": value for task, value in results["by_task"].items()}
    for name, value in rows.items():
        table.add_row(name, f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
    Console().print(table)
