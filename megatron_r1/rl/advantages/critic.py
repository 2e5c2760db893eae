"""The critic of PPO: a value model beside the policy, with an optimizer of its own.

Shapes: B responses of a micro-batch, L positions of a row, T inputs of all responses, end to end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.config.rl import CriticConfig
from megatron_r1.errors import DataError
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import LossFunction
from megatron_r1.model.reward_head import head_of
from megatron_r1.model.shards import Shard, part_of, shards
from megatron_r1.parallel.comm import max_over_ranks, sum_over_ranks
from megatron_r1.parallel.mesh import is_metrics_rank
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.rl.advantages.estimators import RolloutAdvantages
from megatron_r1.rl.advantages.gae import critic_loss
from megatron_r1.rl.policy.batch import PerSample, ResponseBatch, most_inputs
from megatron_r1.rl.policy.policy import outputs_by_sample
from megatron_r1.train.metrics import logged_sums
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.optimizer_state import OptimizerState
from megatron_r1.train.routing import FROZEN
from megatron_r1.train.update import UpdateResult, update

SAVED = "critic"
"""Kind of its weights in a checkpoint; its optimizer's state is `critic_` and the kind that it has of the policy."""
PROGRESS = "critic_progress"
UPDATES = "updates"


class AuxiliaryModel(Protocol):
    """A model that is trained beside the policy, on the same mini-batches."""

    def in_warmup(self, rollouts: int) -> bool:
        """Whether the policy is not trained yet after so many rollouts."""
        ...

    def update(
        self, micro_batches: Sequence[ResponseBatch], advantages: RolloutAdvantages, tokens: int, lr_scale: float
    ) -> bool:
        """Collective: one update on a mini-batch; whether its gradient was finite.

        Args:
            advantages: of the rollout, with the targets of this model.
            tokens: of the whole mini-batch that are trained on.
            lr_scale: share of the peak learning rate.
        """
        ...

    def metrics(self, advantages: RolloutAdvantages) -> dict[str, Any]:
        """Collective: of the rollout, after its last update; the same on every rank."""
        ...

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Collective: kind and shard, for a checkpoint, of what this rank owns."""
        ...


class NoCritic:
    """The policy alone is trained."""

    def in_warmup(self, rollouts: int) -> bool:
        return False

    def update(
        self, micro_batches: Sequence[ResponseBatch], advantages: RolloutAdvantages, tokens: int, lr_scale: float
    ) -> bool:
        return True

    def metrics(self, advantages: RolloutAdvantages) -> dict[str, Any]:
        return {}

    def saved(self) -> Iterator[tuple[str, Shard]]:
        yield from ()


class Critic:
    """A model with a scalar head at every position, trained to predict the return that follows."""

    def __init__(self, model: Model, optimizer: Optimizer, settings: CriticConfig):
        """
        Args:
            model: the bare model, its head attached.
            optimizer: of this model alone.
        """
        self._model, self._optimizer, self._settings = model, optimizer, settings
        self._updates = 0
        self._seconds, self._results = 0.0, list[UpdateResult]()
        FROZEN.apply(model, 0)

    def values_by_sample(self, micro_batches: Sequence[ResponseBatch]) -> PerSample:
        """Each sample's value at each position, [L], without gradient; empty except on the last pipeline stage."""
        started = time.perf_counter()
        values = outputs_by_sample(self._model, micro_batches, self._values)
        self._seconds += time.perf_counter() - started
        return values

    def in_warmup(self, rollouts: int) -> bool:
        return rollouts < self._settings.warmup_rollouts

    def update(
        self, micro_batches: Sequence[ResponseBatch], advantages: RolloutAdvantages, tokens: int, lr_scale: float
    ) -> bool:
        started, targets = time.perf_counter(), advantages.value_targets

        def forward(model: Any, batch: ResponseBatch) -> tuple[Tensor, LossFunction]:
            def loss_function(values_1T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                return critic_loss(
                    batch.rows(values_1T),
                    batch.gather(targets.old_values),
                    batch.gather(targets.returns),
                    batch.mask_BL,
                    clip=self._settings.value_clip,
                    num_tokens=max(tokens, 1),
                )

            return self._values(model, batch), loss_function

        rate, length = lr_scale * self._settings.learning_rate, most_inputs(micro_batches)
        result = update(self._model, self._optimizer, micro_batches, forward, rate, length, reduce="sum")
        self._updates += not result.skipped
        self._results.append(result)
        self._seconds += time.perf_counter() - started
        return not result.skipped

    def metrics(self, advantages: RolloutAdvantages) -> dict[str, Any]:
        results, seconds = self._results, self._seconds
        self._results, self._seconds = [], 0.0
        sums = sum_over_ranks("critic", logged_sums(results))
        statistics = advantages.value_targets.statistics if is_metrics_rank() else {}
        norms = [result.gradient_norm for result in results if not result.skipped]
        return {
            **{key: sums[key] / len(results) for key in sorted(sums)},
            **max_over_ranks("critic", statistics),  # the same on all ranks that have them
            "critic/gradient_norm": sum(norms) / len(norms) if norms else float("nan"),
            "perf/critic_seconds": seconds,
        }

    def _values(self, model: Any, batch: ResponseBatch) -> Tensor:
        """[1, T] on the last pipeline stage; hidden states for the next one on others."""
        with without_multi_token_prediction(self._model):
            values_1T: Tensor = model(
                batch.inputs_1T, batch.positions_1T, None, packed_seq_params=batch.packed, output_processor=self._read
            )
            return values_1T

    def _read(self, *, hidden_states: Tensor, **_: Any) -> Tensor:
        return head_of(self._model).everywhere(hidden_states)

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Collective: kind and shard, for a checkpoint, of what this rank owns."""
        yield from ((SAVED, shard) for shard in shards(self._model) if shard.owned)
        yield from ((f"{SAVED}_{kind}", shard) for kind, shard in OptimizerState(self._model, self._optimizer).shards())
        if is_rank_zero():
            yield PROGRESS, Shard(UPDATES, (1,), (0,), torch.tensor([self._updates]), owned=True)

    def restore(self, saved: Callable[[str], WholeTensors | None]) -> None:
        """Collective: continue from a checkpoint.

        Args:
            saved: its tensors of a kind.

        Raises:
            DataError: it holds no critic.
        """

        def found(kind: str) -> Mapping[str, Tensor]:
            if (tensors := saved(kind)) is None:
                raise DataError(f"the checkpoint to resume from holds no {kind}: its run had no critic")
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
