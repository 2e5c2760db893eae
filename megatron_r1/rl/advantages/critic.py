"""The critic of proximal policy optimization: a value model beside the policy, and the advantages that it gives.

Shapes: B answers of a micro-batch, S answers of this rank, L positions of a row, R tokens of the longest response.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.config.critic import CriticConfig
from megatron_r1.errors import DataError
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.chunks import Model
from megatron_r1.model.reward_head import head_of
from megatron_r1.model.shards import Shard, part_of, shards
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.launcher import is_rank_zero
from megatron_r1.parallel.mesh import data_parallel_group, is_metrics_rank
from megatron_r1.rl.advantages.estimators import AdvantageInputs, RolloutAdvantages
from megatron_r1.rl.advantages.gae import (
    Estimates,
    critic_loss,
    explained_variance,
    generalized_advantages,
    spread,
    token_rewards,
    whitened,
)
from megatron_r1.rl.policy.batch import ResponseBatch, response_part, to_positions
from megatron_r1.rl.policy.frozen_logprobs import BySample
from megatron_r1.rl.policy.policy import inputs_of, longest_input, outputs_by_sample, pad_to_batch
from megatron_r1.rollout.sample import Sample
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.optimizer_state import OptimizerState
from megatron_r1.train.routing import FROZEN
from megatron_r1.train.update import UpdateResult, update

SAVED = "critic"
"""Kind of its weights in a checkpoint; its optimizer's state is `critic_` and the kind that it has of the policy."""
PROGRESS = "critic_progress"
UPDATES = "updates"


class Critic:
    """A model with a scalar head at every position, which learns what is still to come."""

    def __init__(self, model: Model, optimizer: Optimizer, clip: float):
        """
        Args:
            model: the bare model, its head attached.
            optimizer: of this model alone.
            clip: of `critic_loss`.
        """
        self._model, self._optimizer, self._clip = model, optimizer, clip
        self._updates = 0
        FROZEN.apply(model, 0)

    def values_by_sample(self, micro_batches: Sequence[ResponseBatch]) -> BySample:
        """Each sample's value at each position, of what follows it, without gradient."""
        return outputs_by_sample(self._model, micro_batches, self._values)

    def update(
        self, micro_batches: Sequence[ResponseBatch], old: BySample, returns: BySample, tokens: int, rate: float
    ) -> UpdateResult:
        """Learn returns on a mini-batch.

        Args:
            old: values at the start of the rollout.
            tokens: of the whole mini-batch that are learned from.
        """
        # megatron-core takes means over micro-batches and data-parallel ranks, which must come out as sums.
        scale = len(micro_batches) * dist.get_world_size(data_parallel_group())

        def forward(model: Any, rows: ResponseBatch) -> tuple[Tensor, Callable]:
            def loss_function(values_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                told = pad_to_batch(old, rows), pad_to_batch(returns, rows), rows.mask_BL
                loss, metrics = critic_loss(values_BL, *told, clip=self._clip, num_tokens=max(tokens, 1))
                return loss * scale, metrics

            return self._values(model, rows), loss_function

        result = update(self._model, self._optimizer, micro_batches, forward, rate, longest_input(micro_batches))
        self._updates += not result.skipped
        return result

    def _values(self, model: Any, rows: ResponseBatch) -> Tensor:
        """[B, L] on the last pipeline stage; hidden states for the next one on others."""
        with without_multi_token_prediction(self._model):
            return model(*inputs_of(rows), None, output_processor=self._read)

    def _read(self, *, hidden_states: Tensor, **_: Any) -> Tensor:
        return head_of(self._model).everywhere(hidden_states)

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Kind and shard, for a checkpoint, of what this rank speaks for; collective over all ranks."""
        yield from ((SAVED, shard) for shard in shards(self._model) if shard.owned)
        yield from ((f"{SAVED}_{kind}", shard) for kind, shard in OptimizerState(self._model, self._optimizer).shards())
        if is_rank_zero():
            yield PROGRESS, Shard(UPDATES, (1,), (0,), torch.tensor([self._updates]), owned=True)

    def restore(self, saved: Callable[[str], WholeTensors | None]) -> None:
        """Collective: go on from a checkpoint.

        Args:
            saved: its tensors of a kind.

        Raises:
            DataError: it holds no critic.
        """

        def found(kind: str) -> Mapping[str, Tensor]:
            if (tensors := saved(kind)) is None:
                raise DataError(f"the checkpoint to go on from holds no {kind}: its run had no critic")
            return tensors

        weights = found(SAVED)
        self._updates = int(found(PROGRESS)[UPDATES])
        for shard in shards(self._model):
            shard.tensor.copy_(part_of(weights, shard))
        kinds: dict[str, Mapping[str, Tensor]] = {}

        def read(kind: str, shard: Shard) -> Tensor:
            if kind not in kinds:
                kinds[kind] = found(f"{SAVED}_{kind}")
            return part_of(kinds[kind], shard)

        OptimizerState(self._model, self._optimizer).load(read, self._updates)


class CriticAdvantages:
    """A token's reward to come against the critic's value of it: generalized advantage estimation, as PPO has it."""

    def __init__(self, critic: Critic, settings: CriticConfig):
        self._critic, self._settings = critic, settings

    def of(self, taken: AdvantageInputs) -> RolloutAdvantages:
        started = time.perf_counter()
        old = self._critic.values_by_sample(taken.rows)
        return CriticCredit(self._critic, self._settings, taken, old, time.perf_counter() - started)

    def in_critic_warmup(self, rollouts: int) -> bool:
        return rollouts < self._settings.warmup_rollouts


class CriticCredit:
    """The advantages of one rollout by the critic as it stood before, and the critic's updates."""

    def __init__(self, critic: Critic, settings: CriticConfig, taken: AdvantageInputs, old: BySample, seconds: float):
        """Collective over ranks that see other data.

        Args:
            old: values of this rank's samples, by position; empty but on the last pipeline stage.
            seconds: that they took.
        """
        self._critic, self._rate, self._old, self._seconds = critic, settings.learning_rate, old, seconds
        self._results: list[UpdateResult] = []
        self._known: dict[str, float] = {}
        self._advantages: BySample = {}
        self._returns: BySample = {}
        if old:
            self._estimate(settings, taken)

    def _estimate(self, settings: CriticConfig, taken: AdvantageInputs) -> None:
        places = sorted(self._old)
        samples = [taken.samples[place] for place in places]
        values_SR = _stacked([response_part(taken.samples[place], self._old[place]) for place in places])
        mask_SR = _stacked([values_SR.new_full((len(s.response_tokens),), float(s.in_loss)) for s in samples]).bool()
        penalties_SR = torch.zeros_like(values_SR)
        if taken.penalties is not None:
            penalties_SR = _stacked([taken.penalties[place] for place in places])
        rewards_S = values_SR.new_tensor([sample.reward for sample in samples])
        rewards_SR = token_rewards(rewards_S, penalties_SR, mask_SR, 1.0) + _of_steps(samples, mask_SR)
        found: Estimates = generalized_advantages(rewards_SR, values_SR, mask_SR, settings.gamma, settings.gae_lambda)
        counted_S = torch.tensor([place in taken.owned_samples for place in places], device=mask_SR.device)
        counted_SR = mask_SR & counted_S[:, None]
        advantages_SR = found.advantages_BL
        self._known = {
            "critic/explained_variance": explained_variance(found.returns_BL, values_SR, counted_SR, _over_data),
            "critic/return": float(spread(found.returns_BL, counted_SR, _over_data).mean),
        }
        if settings.whiten_advantages:
            advantages_SR = whitened(advantages_SR, mask_SR, spread(advantages_SR, counted_SR, _over_data))
        self._advantages, self._returns = (
            {place: to_positions(sample, row_R) for place, sample, row_R in zip(places, samples, rows_SR, strict=True)}
            for rows_SR in (advantages_SR, found.returns_BL)
        )

    def on(self, rows: ResponseBatch) -> Tensor:
        return pad_to_batch(self._advantages, rows)

    def learn(self, micro_batches: Sequence[ResponseBatch], tokens: int, share: float) -> bool:
        started = time.perf_counter()
        result = self._critic.update(micro_batches, self._old, self._returns, tokens, share * self._rate)
        self._results.append(result)
        self._seconds += time.perf_counter() - started
        return not result.skipped

    def metrics(self) -> dict[str, Any]:
        mine = [[{k: float(v) for k, v in entry.items()} for entry in r.passes.logged] for r in self._results]
        told = [found for found in all_gather_object((mine, self._known) if is_metrics_rank() else None) if found]
        entries = [entry for updates, _ in told for update in updates for entry in update]
        norms = [result.gradient_norm for result in self._results if not result.skipped]
        return {
            **{key: sum(entry[key] for entry in entries) / len(self._results) for key in sorted(entries[0])},
            **told[0][1],
            "critic/gradient_norm": sum(norms) / len(norms) if norms else float("nan"),
            "perf/critic_seconds": self._seconds,
        }


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """[S, R], 0 beyond each part's end."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _of_steps(samples: Sequence[Sample], mask_SR: Tensor) -> Tensor:
    """Rewards of steps at the tokens that end them, [S, R]."""
    rewards_SR = torch.zeros(mask_SR.shape, device=mask_SR.device)
    for row_R, sample in zip(rewards_SR, samples, strict=True):
        for end, value in sample.steps:
            row_R[end] += value
    return rewards_SR * mask_SR


def _over_data(mine: Tensor) -> Tensor:
    """Collective: added up over data-parallel ranks."""
    group = data_parallel_group()
    if group.size() > 1:
        mine = mine.clone()
        dist.all_reduce(mine, group=group)
    return mine
