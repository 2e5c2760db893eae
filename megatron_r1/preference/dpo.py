"""Direct preference optimization on any layout of ranks: an update on pairs of responses, and implicit rewards.

Shapes: P pairs of a micro-batch, B = 2 P responses (of each pair the chosen one first), L positions of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.data.preference.examples import TokenizedPreference
from megatron_r1.evaluation.intervals import clustered
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import LossFunction
from megatron_r1.model.fp8.tokens import token_multiple
from megatron_r1.model.vocab_parallel import TokenScores
from megatron_r1.parallel.comm import merge_by_key
from megatron_r1.parallel.mesh import data_parallel_group, is_metrics_rank
from megatron_r1.preference.dpo_loss import dpo_loss, response_logprob
from megatron_r1.preference.reward_model import pairwise_accuracy
from megatron_r1.rl.policy.batch import ResponseBatch, inputs_and_targets, most_inputs
from megatron_r1.rl.policy.policy import Policy
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.update import UpdateResult, update


class DirectPreference:
    """Trains a policy on preference pairs, relative to a frozen reference policy."""

    def __init__(
        self,
        model: Model,
        reference: ReferencePolicy,
        beta: float,
        label_smoothing: float,
        pad: int,
        device: str,
    ):
        """
        Args:
            model: the bare model.
            beta, label_smoothing: as in `dpo_loss`.
        """
        self.reference, self.beta = reference, beta
        self._model, self._label_smoothing = model, label_smoothing
        self._pad, self._device = pad, device
        # The probability of a response does not depend on the temperature that an engine samples with.
        self._policy = Policy(model, temperature=1.0)

    def learn(
        self, optimizer: Optimizer, examples: Sequence[TokenizedPreference], rate: float, size: int
    ) -> tuple[UpdateResult, int]:
        """Collective: one update on a global batch of pairs, the same on every rank and a multiple of them.

        Args:
            rate: learning rate.
            size: pairs of a micro-batch.
        Returns:
            the update's result and the number of this rank's tokens, padding included. The result's logged values are
            `train/loss` and the metrics of `dpo_loss`; summed over micro-batches they are means over all pairs.
        """
        micro_batches = self._micro_batches(examples, size)
        with self.reference.in_place():
            reference = self._log_probs(micro_batches)

        def forward(model: Any, batch: ResponseBatch) -> tuple[Any, LossFunction]:
            def loss_function(scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
                policy_B = response_logprob(scores.log_probs, batch.mask_BL)
                reference_B = torch.stack([reference[index] for index in batch.indices_B.tolist()])
                loss, metrics = dpo_loss(
                    *sides(policy_B),
                    *sides(reference_B),
                    beta=self.beta,
                    label_smoothing=self._label_smoothing,
                    num_pairs=len(examples),
                )
                return loss, {"train/loss": loss.detach(), **metrics}

            return self._policy.scores(model, batch), loss_function

        length = most_inputs(micro_batches)
        result = update(self._model, optimizer, micro_batches, forward, rate, length, reduce="sum")
        return result, sum(batch.inputs_1T.numel() for batch in micro_batches)

    def gaps(self, examples: Sequence[TokenizedPreference], size: int) -> list[float]:
        """Collective: log p(chosen) - log p(rejected) of each pair under the current weights, on every rank.

        Args:
            examples: any number of pairs, the same on every rank.
            size: pairs of a pass.
        """
        mine = self._log_probs(self._micro_batches(examples, size))
        floats = {number: float(log_prob) for number, log_prob in mine.items()} if is_metrics_rank() else {}
        everyone = merge_by_key(floats)
        return [everyone[2 * index] - everyone[2 * index + 1] for index in range(len(examples))]

    def _micro_batches(self, examples: Sequence[TokenizedPreference], size: int) -> list[ResponseBatch]:
        """This data-parallel rank's share, in the same number of micro-batches as on every other rank.

        Experts may be divided among these ranks, which then exchange tokens in every pass. Where the pairs cannot be
        divided evenly, some occur twice, the second time only as padding whose result is not used.
        """
        group = data_parallel_group()
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        indices = range(rank, -(-len(examples) // ranks) * ranks, ranks)
        return [self._batch(examples, indices[start : start + size]) for start in range(0, len(indices), size)]

    def _batch(self, examples: Sequence[TokenizedPreference], indices: Sequence[int]) -> ResponseBatch:
        """Both responses of the pairs at `indices`; a response's index is 2 x its pair's, plus 1 if it is rejected."""
        sequences = [each for index in indices for each in examples[index % len(examples)].sequences]
        inputs_1T, targets_1T = inputs_and_targets(
            [torch.tensor(sequence.tokens) for sequence in sequences], self._pad, token_multiple(self._model)
        )
        lengths = tuple(len(sequence.tokens) - 1 for sequence in sequences)
        index_L = torch.arange(max(lengths))
        starts_B, ends_B = torch.tensor([sequence.loss_start - 1 for sequence in sequences]), torch.tensor(lengths)
        mask_BL = (index_L >= starts_B[:, None]) & (index_L < ends_B[:, None])
        return ResponseBatch(
            inputs_1T.to(self._device),
            targets_1T.to(self._device),
            lengths,
            mask_BL.to(self._device),
            torch.zeros(mask_BL.shape, device=self._device),
            torch.tensor([2 * index + side for index in indices for side in (0, 1)]),
        )

    def _log_probs(self, micro_batches: Sequence[ResponseBatch]) -> dict[int, Tensor]:
        """log p(response) by the response's index, without gradient; empty except on the last pipeline stage."""
        by_token = self._policy.logprobs_by_sample(micro_batches)
        found: dict[int, Tensor] = {}
        for batch in micro_batches if by_token else ():
            log_prob_B = response_logprob(batch.gather(by_token), batch.mask_BL)
            found |= zip(batch.indices_B.tolist(), log_prob_B, strict=True)
        return found


class EvalPairs:
    """Evaluates how a policy orders validation pairs."""

    def __init__(self, preference: DirectPreference, examples: Sequence[TokenizedPreference], size: int):
        """Collective.

        Args:
            size: pairs of a pass.
        """
        self._preference, self._examples, self._size = preference, examples, size
        with preference.reference.in_place():
            self._before = preference.gaps(examples, size)

    def __call__(self) -> dict[str, float]:
        """Collective: share of correctly ordered pairs with a 95 % interval, and the mean margin."""
        margins = torch.tensor(self.margins(), dtype=torch.float64)
        found = clustered(pairwise_accuracy(margins).tolist())
        return {
            "eval/accuracy": found.mean,
            "eval/accuracy_low": found.low,
            "eval/accuracy_high": found.high,
            "eval/margin": float(margins.mean()),
        }

    def margins(self) -> list[float]:
        """Collective: implicit reward of the chosen response minus that of the rejected one, on every rank."""
        gaps = self._preference.gaps(self._examples, self._size)
        return [self._preference.beta * (gap - before) for gap, before in zip(gaps, self._before, strict=True)]


def sides(values_B: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the chosen and those of the rejected responses, [P] each."""
    return values_B[0::2], values_B[1::2]
