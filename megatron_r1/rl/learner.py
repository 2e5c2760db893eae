"""From scored samples to updated weights: advantages, batches, the objective.

Shapes: N groups, G answers of a group, B answers of a micro-batch, L positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.model.replay import RoutingReplay
from megatron_r1.model.vocab_parallel import TokenScores
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.launcher import is_rank_zero
from megatron_r1.parallel.mesh import data_parallel_group, is_last_stage, is_metrics_rank, tensor_parallel_group
from megatron_r1.rl.advantages.estimators import (
    AdvantageInputs,
    Advantages,
    RolloutAdvantages,
    build_advantage_estimator,
)
from megatron_r1.rl.batching import micro_batches_by_tokens, shuffle_into_mini_batches
from megatron_r1.rl.mismatch import KEYS, alarms, mismatch_sums, summary
from megatron_r1.rl.objective.aggregation import BatchTotals
from megatron_r1.rl.objective.objective import ObjectiveInputs, objective_of
from megatron_r1.rl.policy.batch import ResponseBatch, make_batch, num_tokens
from megatron_r1.rl.policy.frozen_logprobs import (
    FrozenLogProbs,
    compute_frozen_logprobs,
    sum_per_response,
    token_penalties,
)
from megatron_r1.rl.policy.policy import Policy, longest_input
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.rollout.sample import Sample
from megatron_r1.train.batching import divide_by_tokens
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.routing import FROZEN
from megatron_r1.train.schedule import learning_rate
from megatron_r1.train.state import TrainState
from megatron_r1.train.update import UpdateResult, count_skips, update

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MiniBatch:
    """What one update learns from."""

    totals: BatchTotals
    """Over all micro-batches and ranks."""
    micro_batches: list[ResponseBatch]
    """This rank's."""


class Learner:
    """Reinforcement learning on one rollout of groups at a time, by the configured objective, over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        optimizer: Optimizer,
        reference: ReferencePolicy | None,
        pad_token: int,
        device: str,
        replay: RoutingReplay | None = None,
        advantages: Advantages | None = None,
    ):
        """
        Args:
            replay: lets the model's routers take the experts that the engine took.
            advantages: where they come from; None is the group.
        """
        self._config, self._model, self._optimizer = config, model, optimizer
        self._reference, self._pad, self._device = reference, pad_token, device
        temperature, self._replay = config.rollout.temperature, replay
        self._policy = Policy(model, temperature, self._replay)
        # The reference is another model: it routes for itself.
        self._reference_policy = Policy(model, temperature)
        self._objective = objective_of(config.rl)
        self._advantages = advantages or build_advantage_estimator(config.rl)
        FROZEN.apply(model, 0)

    def learn(self, samples: Sequence[Sample], state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Train on a rollout; `state` counts one more rollout and its updates. Its prompts are the caller's to count.

        Args:
            samples: whole groups, one after the other; the same on every rank.
        """
        rl, train = self._config.rl, self._config.train
        count = min(rl.updates_per_rollout, len(samples))
        mini_batches = [
            self._mini_batch(samples, indices.tolist())
            for epoch in range(rl.epochs_per_rollout)
            for indices in shuffle_into_mini_batches(len(samples), count, (self._config.seed, state.step, epoch))
        ]
        # Later epochs divide the same samples anew: among several ranks, some go to a rank that had not had them.
        alone = dist.get_world_size(data_parallel_group()) == 1
        seen = [rows for batch in (mini_batches[:count] if alone else mini_batches) for rows in batch.micro_batches]
        told = compute_frozen_logprobs(rl, self._model, self._policy, self._reference_policy, self._reference, seen)
        taken, extra = self._taken(samples, seen, mini_batches[:count], told)
        credit = self._advantages.of(taken)
        rate = learning_rate(train.schedule, state.step + 1, train.steps, state.consumed_tokens)
        share = rate / train.schedule.learning_rate
        rate = 0.0 if self._advantages.in_critic_warmup(state.step) else rate
        results, skipped = [], state.skipped_in_row
        for batch in mini_batches:
            finite = credit.learn(batch.micro_batches, batch.totals.tokens, share)
            result = self._update(batch, told, credit, rate)
            skipped = count_skips(skipped, result.skipped or not finite, train.max_skipped_steps, state.step + 1)
            results.append(result)
        if self._reference and rl.reference_sync_interval and (state.step + 1) % rl.reference_sync_interval == 0:
            self._reference.reset()
        state = state.advance(
            updates=state.updates + sum(not result.skipped for result in results),
            skipped_in_row=skipped,
            consumed_tokens=state.consumed_tokens + sum(map(num_tokens, samples)),
        )
        row = {**combined_metrics(results), **credit.metrics(), **self._routing_metrics(), **extra}
        row["train/learning_rate"] = rate
        for alarm in alarms(row, rl.mismatch) if is_rank_zero() else ():
            logger.warning("step %d: %s", state.step, alarm)
        return state, row

    def _taken(
        self, samples: Sequence[Sample], seen: Sequence[ResponseBatch], once: Sequence[MiniBatch], told: FrozenLogProbs
    ) -> tuple[AdvantageInputs, dict[str, float]]:
        """Collective: what advantages are made of, and metrics; a penalty that is in the reward is taken here.

        Args:
            seen: micro-batches of all passes; once: those of one pass, in which a sample is on one data-parallel rank.
        """
        rl = self._config.rl
        owned_samples = frozenset(
            sample
            for batch in once
            for rows in batch.micro_batches
            for sample, learned in zip(rows.samples_B.tolist(), rows.mask_BL.any(1).tolist(), strict=True)
            if learned
        )
        if rl.kl_placement != "reward" or not rl.kl_coefficient:
            return AdvantageInputs(samples, seen, owned_samples), {}
        by_token = {
            place: rl.kl_coefficient * values_L
            for place, values_L in token_penalties(rl, samples, self._policy, told, seen).items()
        }
        sums = sum_per_response(by_token, len(samples))
        return AdvantageInputs(samples, seen, owned_samples, by_token, sums), {
            "policy/kl_in_reward": float(sums.mean())
        }

    def _routing_metrics(self) -> dict[str, float]:
        """Share of the engine's choices that the trainer's routers would have made otherwise, over all passes."""
        if not self._replay:
            return {}
        told, otherwise = map(sum, zip(*all_gather_object(self._replay.count()), strict=True))
        return {"mismatch/routing": otherwise / max(1, told)}

    def _mini_batch(self, samples: Sequence[Sample], indices: Sequence[int]) -> MiniBatch:
        learned = sum(len(samples[index].response_tokens) for index in indices if samples[index].in_loss)
        totals = BatchTotals(len(indices), learned, self._config.rollout.max_response_tokens)
        return MiniBatch(totals, list(self._micro_batches(samples, indices)))

    def _micro_batches(self, samples: Sequence[Sample], indices: Sequence[int]) -> Iterator[ResponseBatch]:
        """This rank's part of a mini-batch; every data-parallel rank gets the same number of micro-batches."""
        group = data_parallel_group()
        lengths = [num_tokens(samples[index]) for index in indices]
        shares = [
            [[share[i] for i in batch] for batch in self._by_tokens([lengths[i] for i in share])]
            for share in divide_by_tokens(lengths, dist.get_world_size(group))
        ]
        mine = shares[dist.get_rank(group)]
        for batch in mine:
            chosen = [indices[i] for i in batch]
            yield make_batch(samples, chosen, self._pad, self._device, self._length_multiple)
        # Experts may be shared with ranks that have more to do: they exchange tokens in every pass.
        idle = make_batch(samples, indices[:1], self._pad, self._device, self._length_multiple).masked()
        for _ in range(max(map(len, shares)) - len(mine)):
            yield idle

    def _by_tokens(self, lengths: Sequence[int]) -> list[list[int]]:
        return micro_batches_by_tokens(lengths, self._config.rl.tokens_per_micro_batch)

    @property
    def _length_multiple(self) -> int:
        """Sequence parallelism shares each row's positions out."""
        return dist.get_world_size(tensor_parallel_group())

    def _update(self, batch: MiniBatch, told: FrozenLogProbs, credit: RolloutAdvantages, rate: float) -> UpdateResult:
        rl, micro_batches = self._config.rl, batch.micro_batches
        # megatron-core takes means over micro-batches and data-parallel ranks, which must come out as sums.
        scale = len(micro_batches) * dist.get_world_size(data_parallel_group())

        def forward(model: Any, rows: ResponseBatch) -> tuple[Any, Callable]:
            def loss_function(scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
                answers = ObjectiveInputs(
                    scores.log_probs,
                    told.old_rows(rows),
                    credit.on(rows),
                    rows.mask_BL,
                    told.reference_rows(rows),
                    scores.divergence,
                    scores.entropy,
                    rows.rollout_log_probs_BL,
                )
                loss, metrics = self._objective.loss(answers, batch.totals)
                entropy = scores.entropy.detach().where(rows.mask_BL, 0.0).sum()
                limits = rl.mismatch.low, rl.mismatch.high
                apart = mismatch_sums(scores.log_probs, rows.rollout_log_probs_BL, rows.mask_BL, *limits)
                return loss * scale, metrics | apart | {"policy/entropy": entropy, "tokens": rows.mask_BL.sum()}

            # Where the penalty is in the reward, the whole distribution has served.
            other = told.other(rows) if rl.kl_placement == "loss" and is_last_stage() else None
            return self._policy.scores(model, rows, other), loss_function

        try:
            return update(self._model, self._optimizer, micro_batches, forward, rate, longest_input(micro_batches))
        finally:
            if self._replay:
                self._replay.done()


def combined_metrics(results: Sequence[UpdateResult]) -> dict[str, Any]:
    """Metrics of a rollout, the same on every rank: means over its updates.

    What trainer and engine disagree on is that of the first update, before weights moved.
    """
    mine = [[{key: float(value) for key, value in entry.items()} for entry in r.passes.logged] for r in results]
    told = [entries for entries in all_gather_object(mine if is_metrics_rank() else None) if entries]
    updates = [[entry for rank in told for entry in rank[number]] for number in range(len(results))]
    keys = updates[0][0].keys() - {*KEYS}
    row = {key: sum(entry[key] for update in updates for entry in update) / len(results) for key in sorted(keys)}
    row["policy/entropy"] /= row.pop("tokens") or 1.0
    row |= summary(updates[0])
    norms = [result.gradient_norm for result in results if not result.skipped]
    row["train/gradient_norm"] = sum(norms) / len(norms) if norms else float("nan")
    row["train/skipped_updates"] = sum(result.skipped for result in results)
    return row
