"""Direct preference optimization on any layout of ranks: an update on pairs of answers, and implicit rewards.

Shapes: P pairs of a micro-batch, B = 2 P answers (of each pair the better one first), L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.data.preference.examples import TokenizedPreference
from megatron_r1.evaluation.intervals import clustered
from megatron_r1.model.chunks import Model
from megatron_r1.model.vocab_parallel import TokenScores
from megatron_r1.parallel.comm import merge_by_key
from megatron_r1.parallel.mesh import data_parallel_group, is_metrics_rank
from megatron_r1.preference.dpo_loss import answer_log_prob, dpo_loss
from megatron_r1.preference.reward_model import pairwise_accuracy, reward_micro_batch
from megatron_r1.rl.policy.batch import ResponseBatch, longest_input
from megatron_r1.rl.policy.policy import Policy
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.update import UpdateResult, update


class DirectPreference:
    """A policy that learns which of two answers is better, held to a reference."""

    def __init__(
        self,
        model: Model,
        reference: ReferencePolicy,
        beta: float,
        label_smoothing: float,
        pad: int,
        device: str,
        multiple: int = 1,
    ):
        """
        Args:
            model: the bare model.
            beta, label_smoothing: as in `dpo_loss`.
            multiple: tensor-parallel ranks, which share out a row's positions.
        """
        self.reference, self.beta = reference, beta
        self._model, self._label_smoothing = model, label_smoothing
        self._pad, self._device, self._multiple = pad, device, multiple
        # Answers have a probability of their own, whatever temperature some engine samples with.
        self._policy = Policy(model, temperature=1.0)

    def learn(
        self, optimizer: Optimizer, examples: Sequence[TokenizedPreference], rate: float, size: int
    ) -> tuple[UpdateResult, int]:
        """Collective: one update on a global batch of pairs, the same on every rank and a multiple of them.

        Args:
            rate: learning rate.
            size: pairs of a micro-batch.
        Returns:
            what the update did, with `train/loss` and the metrics of `dpo_loss` logged, whose sums are means over all
            pairs; and this rank's tokens, padding included.
        """
        micro_batches = self._micro_batches(examples, size)
        with self.reference.in_place():
            reference = self._log_probs(micro_batches)

        def forward(model: Any, rows: ResponseBatch) -> tuple[Any, Callable]:
            def loss_function(scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
                policy_B = answer_log_prob(scores.log_probs, rows.mask_BL)
                reference_B = torch.stack([reference[answer] for answer in rows.indices_B.tolist()])
                loss, metrics = dpo_loss(
                    *sides(policy_B),
                    *sides(reference_B),
                    beta=self.beta,
                    label_smoothing=self._label_smoothing,
                    num_pairs=len(examples),
                )
                return loss, {"train/loss": loss.detach(), **metrics}

            return self._policy.scores(model, rows), loss_function

        length = longest_input(micro_batches)
        result = update(self._model, optimizer, micro_batches, forward, rate, length, reduce="sum")
        return result, sum(rows.inputs_BL.numel() for rows in micro_batches)

    def gaps(self, examples: Sequence[TokenizedPreference], size: int) -> list[float]:
        """Collective: by how much more log p(better answer) is than log p(the other), for each pair, on every rank.

        Under the weights as they stand.

        Args:
            examples: any number of them, the same on every rank.
            size: pairs of a pass.
        """
        mine = self._log_probs(self._micro_batches(examples, size))
        floats = {number: float(log_prob) for number, log_prob in mine.items()} if is_metrics_rank() else {}
        everyone = merge_by_key(floats)
        return [everyone[2 * index] - everyone[2 * index + 1] for index in range(len(examples))]

    def _micro_batches(self, examples: Sequence[TokenizedPreference], size: int) -> list[ResponseBatch]:
        """This data-parallel rank's share, in as many micro-batches as every other's.

        Ranks may share experts, and exchange tokens in every pass: where pairs cannot be divided evenly, some come
        twice, the second time as answers that nobody asks for.
        """
        group = data_parallel_group()
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        places = range(rank, -(-len(examples) // ranks) * ranks, ranks)
        return [self._rows(examples, places[start : start + size]) for start in range(0, len(places), size)]

    def _rows(self, examples: Sequence[TokenizedPreference], places: Sequence[int]) -> ResponseBatch:
        """Both answers of the pairs at `places`, an answer's number being twice its pair's place, and one more."""
        rows = [row for place in places for row in examples[place % len(examples)].sequences]
        padded = reward_micro_batch(rows, self._pad, self._device, self._multiple)
        return ResponseBatch(
            torch.cat([padded.inputs_BL, padded.labels_BL[:, -1:]], 1),
            padded.learned_BL.bool(),
            torch.zeros_like(padded.learned_BL),
            torch.tensor([2 * place + side for place in places for side in (0, 1)]),
        )

    def _log_probs(self, micro_batches: Sequence[ResponseBatch]) -> dict[int, Tensor]:
        """log p(answer) by the answer's number, without gradient; empty but on the last pipeline stage."""
        by_token = self._policy.logprobs_by_sample(micro_batches)
        found: dict[int, Tensor] = {}
        for rows in micro_batches if by_token else ():
            log_prob_B = answer_log_prob(rows.gather(by_token), rows.mask_BL)
            found |= zip(rows.indices_B.tolist(), log_prob_B, strict=True)
        return found


class EvalPairs:
    """How a policy orders validation pairs."""

    def __init__(self, preference: DirectPreference, examples: Sequence[TokenizedPreference], size: int):
        """Collective.

        Args:
            size: pairs of a pass.
        """
        self._preference, self._examples, self._size = preference, examples, size
        with preference.reference.in_place():
            self._before = preference.gaps(examples, size)

    def __call__(self) -> dict[str, float]:
        """Collective: share of pairs in the right order with a 95 % interval, and the mean margin."""
        margins = torch.tensor(self.margins(), dtype=torch.float64)
        found = clustered(pairwise_accuracy(margins).tolist())
        return {
            "eval/accuracy": found.mean,
            "eval/accuracy_low": found.low,
            "eval/accuracy_high": found.high,
            "eval/margin": float(margins.mean()),
        }

    def margins(self) -> list[float]:
        """Collective: by how much the implicit reward of the better answer is above the other's, on every rank."""
        gaps = self._preference.gaps(self._examples, self._size)
        return [self._preference.beta * (gap - before) for gap, before in zip(gaps, self._before, strict=True)]


def sides(values_B: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the better answers and those of the others, [P] each."""
    return values_B[0::2], values_B[1::2]
