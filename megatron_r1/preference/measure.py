"""How right a reward model is on held-out items, beside what length alone can tell."""

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

ROWS_AT_ONCE = 64


class EvalAccuracy:
    """Whether a reward model orders, or labels, each held-out item rightly."""

    def __init__(
        self,
        model: RewardModel,
        encoder: RewardModelEncoder,
        items: Sequence[PreferenceExample],
        longest_reasoning: int,
    ):
        self._model, self._encoder, self._items = model, encoder, items
        self._longest_reasoning = longest_reasoning

    def __call__(self) -> dict[str, float]:
        """Accuracy with a 95 % interval, the same on every rank."""
        found = clustered(self.per_item())
        return {"eval/accuracy": found.mean, "eval/accuracy_low": found.low, "eval/accuracy_high": found.high}

    def per_item(self) -> list[float]:
        """1, 0, or a half for a tie, for each item; the same on every rank. Collective.

        Where reasoning is learned, the model scores after its own: a judge's would tell it the answer.
        """
        scores = iter(self.scores([side for item in self._items for side in item.responses]))
        margins = []
        for item in self._items:
            of_sides = [next(scores) for _ in item.responses]
            margins.append(of_sides[0] - of_sides[1] if item.rejected else of_sides[0] * (2 * item.safe - 1))
        return pairwise_accuracy(torch.tensor(margins)).tolist()

    def scores(self, sides: Sequence[Any]) -> list[float]:
        return score_texts(
            self._model,
            self._encoder,
            [side.question for side in sides],
            [side.response for side in sides],
            self._longest_reasoning,
        )


def score_texts(
    model: RewardModel,
    encoder: RewardModelEncoder,
    questions: Sequence[str],
    responses: Sequence[str],
    longest_reasoning: int,
) -> list[float]:
    """The score of each response to its question, on every rank.

    Collective over all ranks, which give the same; those that hold the same weights each score a share.
    """
    group, end = data_parallel_group(), encoder.tokenizer.eos
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    pairs = list(zip(questions, responses, strict=True))
    rows = [encoder.without_critique(question, response) for question, response in pairs[rank::ranks]]
    if encoder.reasoning:
        rows = model.generate_critiques(rows, ROWS_AT_ONCE, end, longest_reasoning)
    else:
        rows = [[*row, end] for row in rows]
    scores = [0.0] * len(pairs)
    for place, share in enumerate(all_gather_data_parallel(model.scores(rows, ROWS_AT_ONCE))):
        scores[place::ranks] = share
    return scores


def eval_results(
    correct: Sequence[float],
    training: Sequence[PreferenceExample],
    evaluated: Sequence[PreferenceExample],
    encoder: PairEncoder,
) -> dict[str, Any]:
    """Held-out accuracy, by task too, beside the baselines that see nothing but length; all with 95 % intervals."""

    def tokens(text: str) -> int:
        return len(encoder.tokenizer.encode(text))

    return {
        "items": len(evaluated),
        "accuracy": clustered(correct)._asdict(),
        "by_task": {
            task: clustered([one for one, item in zip(correct, evaluated, strict=True) if item.task == task])._asdict()
            for task in sorted({item.task for item in evaluated})
        },
        "length_baselines": {
            name: clustered(length_baseline(training, evaluated, length))._asdict()
            for name, length in (("characters", len), ("tokens", tokens))
        },
    }


def show(results: dict[str, Any], judge: str) -> None:
    """The results as a table on the terminal, under the name of what orders, or labels, the items."""
    table = Table(title=f"{results['items']} held-out items, 95 % intervals")
    table.add_column("what")
    table.add_column("right")
    rows = {judge: results["accuracy"]}
    rows |= {f"length alone, in {name}": value for name, value in results["length_baselines"].items()}
    rows |= {f"{judge}, {task}": value for task, value in results["by_task"].items()}
    for name, value in rows.items():
        table.add_row(name, f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
    Console().print(table)
