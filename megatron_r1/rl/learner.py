"""From scored samples to updated weights: batches, frozen log-probabilities, advantages, the objective.

Shapes: B responses of a micro-batch, L positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import LossFunction
from megatron_r1.model.fp8.tokens import token_multiple
from megatron_r1.model.replay import NoReplay, Replay
from megatron_r1.model.shards import Shard
from megatron_r1.model.vocab_parallel import TokenScores
from megatron_r1.parallel.comm import max_over_ranks, sum_over_ranks
from megatron_r1.parallel.mesh import data_parallel_group
from megatron_r1.parallel.phases import phase
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.rl.advantages.critic import AuxiliaryModel, Critic, NoCritic
from megatron_r1.rl.advantages.critic_estimator import CriticAdvantages
from megatron_r1.rl.advantages.estimators import AdvantageEstimator, AdvantageInputs, RolloutAdvantages
from megatron_r1.rl.advantages.group_relative import GroupAdvantages, ProcessAdvantages
from megatron_r1.rl.advantages.penalised import PenalisedAdvantages
from megatron_r1.rl.mismatch import KEYS, LARGEST, alarms, mismatch_sums, summary
from megatron_r1.rl.objective.aggregation import BatchTotals
from megatron_r1.rl.objective.objective import ObjectiveInputs, build_objective
from megatron_r1.rl.policy.batch import ResponseBatch, make_batch, most_inputs, num_tokens
from megatron_r1.rl.policy.kl_penalty import build_kl_penalty
from megatron_r1.rl.policy.policy import FrozenLogProbs, Policy, compute_frozen_logprobs
from megatron_r1.rl.policy.reference import FixedPolicy
from megatron_r1.rollout.sample import Sample
from megatron_r1.train.batching import micro_batches_of_ranks, shuffle_into_mini_batches
from megatron_r1.train.metrics import logged_sums
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.routing import post_training_policy
from megatron_r1.train.schedule import learning_rate
from megatron_r1.train.state import TrainState
from megatron_r1.train.update import UpdateResult, count_skips, update

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MiniBatchPlan:
    """The samples of one update, by their index in the rollout, and how they are divided."""

    indices: list[int]
    micro_batches: list[list[list[int]]]
    """Of each data-parallel rank."""
    fill: list[int]
    """The micro-batch, without loss, of ranks that have fewer: ranks may share experts, and exchange tokens in every
    pass, so each makes as many."""

    def num_fills(self, rank: int) -> int:
        """Micro-batches that a data-parallel rank has fewer than the one with most."""
        return max(map(len, self.micro_batches)) - len(self.micro_batches[rank])

    def samples_of(self, rank: int) -> set[int]:
        """Samples that a data-parallel rank has passes over."""
        return set(chain(*self.micro_batches[rank], self.fill if self.num_fills(rank) else ()))


def plan_mini_batches(config: RunConfig, samples: Sequence[Sample], step: int, ranks: int) -> list[MiniBatchPlan]:
    """Every epoch's mini-batches, for so many data-parallel ranks, all of which plan the same."""
    rl, result = config.rl, []
    for epoch in range(rl.epochs_per_rollout):
        seed, updates = (config.seed, step, epoch), min(rl.updates_per_rollout, len(samples))
        for shuffled in shuffle_into_mini_batches(len(samples), updates, seed):
            indices: list[int] = shuffled.tolist()
            lengths = [num_tokens(samples[index]) for index in indices]
            shares = micro_batches_of_ranks(lengths, ranks, rl.tokens_per_micro_batch)
            micro_batches = [[[indices[i] for i in batch] for batch in share] for share in shares]
            result.append(MiniBatchPlan(indices, micro_batches, indices[:1]))
    return result


def shares_of(plans: Sequence[MiniBatchPlan], ranks: int) -> list[list[int]]:
    """The samples that each data-parallel rank has passes over, in any epoch."""
    return [sorted(set().union(*(plan.samples_of(rank) for plan in plans))) for rank in range(ranks)]


@dataclass(frozen=True)
class MiniBatch:
    """The samples of one update."""

    totals: BatchTotals
    """Over all micro-batches and ranks."""
    micro_batches: list[ResponseBatch]
    """This rank's."""


class Learner:
    """Reinforcement learning on one rollout of groups at a time, by the configured objective, over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        optimizer: Optimizer,
        reference: FixedPolicy | None,
        pad_token: int,
        device: str,
        replay: Replay | None = None,
        critic: Critic | None = None,
    ):
        """
        Args:
            reference: of the KL penalty, or the teacher in its place; without a penalty it is not used.
            replay: makes the model's routers use the experts that the engine recorded; None lets them choose.
            critic: for rl.advantage_estimator=critic.
        """
        self._config, self._model, self._optimizer = config, model, optimizer
        self._reference = reference if config.rl.kl_coefficient else None
        self._pad, self._device = pad_token, device
        self._replay: Replay = replay or NoReplay()
        self._policy = Policy(model, config.rollout.temperature, self._replay)
        self._kl = build_kl_penalty(config.rl)
        self._objective = build_objective(config.rl, self._kl.loss_coefficient)
        self._critic: AuxiliaryModel = critic or NoCritic()
        self._estimator = build_advantage_estimator(config, critic)
        post_training_policy(config).apply(model, 0)

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Collective: kind and shard of the state that a checkpoint has beside the policy."""
        if self._reference:
            yield from self._reference.saved()
        yield from self._critic.saved()

    def shares(self, samples: Sequence[Sample], step: int) -> list[list[int]]:
        """For each data-parallel rank the samples, by index, whose responses it needs in `learn`."""
        ranks = dist.get_world_size(data_parallel_group())
        return shares_of(plan_mini_batches(self._config, samples, step, ranks), ranks)

    def learn(self, samples: Sequence[Sample], state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Train on a rollout; returns the state after its updates, in which the caller still counts its prompts.

        Args:
            samples: whole groups, one after the other; the same on every rank, but for responses of other `shares`.
        """
        rl, train = self._config.rl, self._config.train
        mini_batches = self._mini_batches(samples, state.step)
        updates_per_epoch = len(mini_batches) // rl.epochs_per_rollout
        first_epoch = [batch for mini_batch in mini_batches[:updates_per_epoch] for batch in mini_batch.micro_batches]
        # Later epochs divide the same samples differently: among several ranks, some are new to their rank.
        single_data_parallel_rank = dist.get_world_size(data_parallel_group()) == 1
        all_epochs = [batch for mini_batch in mini_batches for batch in mini_batch.micro_batches]
        scored_batches = first_epoch if single_data_parallel_rank else all_epochs
        with phase("log_probs"):
            frozen = compute_frozen_logprobs(rl, self._policy, self._reference, scored_batches)
            penalties = self._kl.reward_penalties(samples, self._policy, frozen, scored_batches)
            inputs = AdvantageInputs(samples, scored_batches, trained_samples(first_epoch), penalties)
            advantages = self._estimator.estimate(inputs)
        rate = learning_rate(train.schedule, state.step + 1, train.steps, state.consumed_tokens)
        lr_scale = rate / train.schedule.learning_rate
        rate = 0.0 if self._critic.in_warmup(state.step) else rate
        results, skipped = [], state.skipped_in_row
        for mini_batch in mini_batches:
            finite = self._critic.update(mini_batch.micro_batches, advantages, mini_batch.totals.tokens, lr_scale)
            result = self._update(mini_batch, frozen, advantages, rate)
            skipped = count_skips(skipped, result.skipped or not finite, train.max_skipped_steps, state.step + 1)
            results.append(result)
        if self._reference:
            self._reference.after_rollout(state.step + 1, rl.reference_sync_interval)
        state = state.advance(
            updates=state.updates + sum(not result.skipped for result in results),
            skipped_in_row=skipped,
            consumed_tokens=state.consumed_tokens + sum(map(num_tokens, samples)),
        )
        metrics = {**combined_metrics(results), **self._critic.metrics(advantages), **self._replay.metrics()}
        if penalties:
            metrics["policy/kl_in_reward"] = float(penalties.per_sample.mean())
        metrics["train/learning_rate"] = rate
        for alarm in alarms(metrics, rl.mismatch) if is_rank_zero() else ():
            logger.warning("step %d: %s", state.step, alarm)
        return state, metrics

    def _mini_batches(self, samples: Sequence[Sample], step: int) -> list[MiniBatch]:
        """This rank's part of every epoch's mini-batches."""
        group, longest = data_parallel_group(), self._config.rollout.max_response_tokens
        rank = group.rank()
        settings = self._pad, self._device, token_multiple(self._model)
        result = []
        for plan in plan_mini_batches(self._config, samples, step, group.size()):
            micro_batches = [make_batch(samples, batch, *settings) for batch in plan.micro_batches[rank]]
            for _ in range(plan.num_fills(rank)):
                micro_batches.append(make_batch(samples, plan.fill, *settings).without_loss())
            tokens = sum(samples[index].response_length for index in plan.indices if samples[index].in_loss)
            result.append(MiniBatch(BatchTotals(len(plan.indices), tokens, longest), micro_batches))
        return result

    def _update(
        self, mini_batch: MiniBatch, frozen: FrozenLogProbs, advantages: RolloutAdvantages, rate: float
    ) -> UpdateResult:
        mismatch, micro_batches = self._config.rl.mismatch, mini_batch.micro_batches

        def forward(model: Any, batch: ResponseBatch) -> tuple[Any, LossFunction]:
            def loss_function(scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
                inputs = ObjectiveInputs(
                    scores.log_probs,
                    batch.rollout_logprobs_BL if frozen.old is None else batch.gather(frozen.old),
                    batch.gather(advantages.by_sample),
                    batch.mask_BL,
                    None if frozen.reference is None else batch.gather(frozen.reference),
                    scores.divergence,
                    scores.entropy,
                    batch.rollout_logprobs_BL,
                )
                loss, metrics = self._objective.loss(inputs, mini_batch.totals)
                metrics |= mismatch_sums(
                    scores.log_probs, batch.rollout_logprobs_BL, batch.mask_BL, mismatch.low, mismatch.high
                )
                entropy = scores.entropy.detach().where(batch.mask_BL, 0.0).sum()
                return loss, metrics | {"policy/entropy": entropy, "tokens": batch.mask_BL.sum()}

            return self._policy.scores(model, batch, self._kl.divergence_target(frozen, batch)), loss_function

        try:
            length = most_inputs(micro_batches)
            return update(self._model, self._optimizer, micro_batches, forward, rate, length, reduce="sum")
        finally:
            self._replay.done()


def build_advantage_estimator(config: RunConfig, critic: Critic | None) -> AdvantageEstimator:
    """The configured estimator."""
    rl = config.rl
    estimator: AdvantageEstimator
    if critic:
        estimator = CriticAdvantages(critic, rl.critic)
    else:
        estimator = (ProcessAdvantages if rl.advantage_estimator == "process" else GroupAdvantages)(rl.advantage_std)
    return PenalisedAdvantages(estimator) if rl.kl_placement == "advantage" else estimator


def trained_samples(micro_batches: Sequence[ResponseBatch]) -> frozenset[int]:
    """Indices of the samples that have tokens in the loss."""
    return frozenset(
        index
        for batch in micro_batches
        for index, trained in zip(batch.indices_B.tolist(), batch.mask_BL.any(1).tolist(), strict=True)
        if trained
    )


def combined_metrics(results: Sequence[UpdateResult]) -> dict[str, Any]:
    """Metrics of a rollout, the same on every rank: means over its updates.

    The mismatch of trainer and engine is that of the first update, before weights moved.
    """
    sums, first = logged_sums(results), logged_sums(results[:1])
    found = sum_over_ranks("policy", sums | {key: first[key] for key in KEYS if key in first})
    metrics = {key: found[key] / len(results) for key in sorted(found.keys() - {*KEYS})}
    metrics["policy/entropy"] /= metrics.pop("tokens") or 1.0
    gaps = [float(entry[LARGEST]) for entry in results[0].passes.logged] if first else []
    largest = max_over_ranks("policy", {LARGEST: float(torch.tensor(gaps).max())} if gaps else {})
    metrics |= summary([found | largest])
    norms = [result.gradient_norm for result in results if not result.skipped]
    metrics["train/gradient_norm"] = sum(norms) / len(norms) if norms else float("nan")
    metrics["train/skipped_updates"] = sum(result.skipped for result in results)
    return metrics
