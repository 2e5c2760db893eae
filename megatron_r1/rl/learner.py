"""From scored samples to updated weights: advantages, batches, the objective, the reference policy.

Shapes: N groups, G answers of a group, B answers of a micro-batch, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.model.build import load_native_tensors, native_tensors, without_multi_token_prediction
from megatron_r1.parallel.mesh import tensor_parallel_group
from megatron_r1.rl.advantage import group_advantages
from megatron_r1.rl.batching import micro_batches_by_tokens, shuffle_into_mini_batches
from megatron_r1.rl.logprob import token_log_probs
from megatron_r1.rl.objective import grpo_loss
from megatron_r1.rl.rows import Rows, make_rows, row_length
from megatron_r1.rollout.sample import Sample
from megatron_r1.train.guard import count_skips
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.schedule import learning_rate
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import UpdateResult, update


class ReferencePolicy:
    """A copy of the weights at some step, balancing bias included: kept on the host, swapped in when needed."""

    def __init__(self, model: torch.nn.Module, weights: Mapping[str, Tensor] | None = None):
        """
        Args:
            weights: by megatron-core name, for a run that goes on; None takes the model's weights as they stand.
        """
        self._model = model
        self.weights = dict(weights) if weights else {}
        if not weights:
            self.reset()

    def reset(self) -> None:
        """Take the model's weights as they stand."""
        self.weights = {name: tensor.cpu().clone() for name, tensor in native_tensors(self._model)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside this block."""
        current = {name: tensor.clone() for name, tensor in native_tensors(self._model)}
        load_native_tensors(self._model, self.weights)
        try:
            yield
        finally:
            load_native_tensors(self._model, current)


class Learner:
    """Group relative policy optimization on one rollout at a time."""

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        optimizer: Optimizer,
        reference: ReferencePolicy | None,
        pad_token: int,
        device: str,
    ):
        self._config, self._model, self._optimizer = config, model, optimizer
        self._reference, self._pad, self._device = reference, pad_token, device

    def learn(self, samples: Sequence[Sample], state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Train on a rollout; `state` counts one more rollout and its updates.

        Args:
            samples: whole groups, one after the other.
        """
        rl = self._config.rl
        rewards_NG = torch.tensor([sample.reward for sample in samples]).view(-1, rl.group_size)
        # On whole groups, before they are divided among mini-batches.
        advantages = group_advantages(rewards_NG, rl.advantage_std).flatten()
        everything = self._micro_batches(samples, range(len(samples)), advantages)
        reference = self._reference_log_probs(everything, len(samples))
        old = self._log_probs_of(everything, len(samples)) if rl.old_log_probs == "trainer" else None
        rate = learning_rate(self._config.train.schedule, state.step + 1, self._config.train.steps)
        results, skipped, updates = [], state.skipped_in_row, state.updates
        for epoch in range(rl.inner_epochs):
            for indices in shuffle_into_mini_batches(
                len(samples), rl.mini_batches, (self._config.seed, state.step, epoch)
            ):
                rows = self._micro_batches(samples, indices.tolist(), advantages)
                result = self._update(rows, len(indices), old, reference, rate)
                skipped = count_skips(skipped, result.skipped, self._config.train.max_skipped_steps, state.step + 1)
                updates += not result.skipped
                results.append(result)
        if self._reference and rl.reference_reset_interval and (state.step + 1) % rl.reference_reset_interval == 0:
            self._reference.reset()
        tokens = sum(map(row_length, samples))
        state = state.advance(
            updates=updates,
            skipped_in_row=skipped,
            consumed_tokens=state.consumed_tokens + tokens,
            data_position=state.data_position + rl.prompts_per_rollout,
        )
        return state, {**_combined(results), "learning_rate": rate}

    def _micro_batches(self, samples: Sequence[Sample], indices: Sequence[int], advantages: Tensor) -> list[Rows]:
        lengths = [row_length(samples[index]) for index in indices]
        return [
            make_rows(samples, [indices[i] for i in chosen], advantages, self._pad, self._device)
            for chosen in micro_batches_by_tokens(lengths, self._config.rl.tokens_per_micro_batch)
        ]

    def _reference_log_probs(self, rows: Sequence[Rows], num_samples: int) -> list[Tensor] | None:
        if not (self._reference and self._config.rl.kl_coefficient):
            return None
        with self._reference.in_place():
            return self._log_probs_of(rows, num_samples)

    def _log_probs_of(self, micro_batches: Sequence[Rows], num_samples: int) -> list[Tensor]:
        """Log-probabilities of every sample's row under the model's present weights, without gradient."""
        result: list[Tensor] = [torch.empty(0)] * num_samples
        with torch.no_grad():
            for rows in micro_batches:
                log_probs_BL, _ = self._log_probs(self._model, rows)
                for place, row_L in zip(rows.samples_B.tolist(), log_probs_BL, strict=True):
                    result[place] = row_L
        return result

    def _log_probs(self, model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        positions_BL = torch.arange(rows.inputs_BL.shape[1], device=rows.tokens_BL.device).expand_as(rows.inputs_BL)
        with without_multi_token_prediction(self._model):
            logits_BLV = model(rows.inputs_BL.contiguous(), positions_BL, None)
        return token_log_probs(logits_BLV, rows.targets_BL, self._config.rollout.temperature, tensor_parallel_group())

    def _update(
        self,
        micro_batches: Sequence[Rows],
        num_answers: int,
        old: list[Tensor] | None,
        reference: list[Tensor] | None,
        rate: float,
    ) -> UpdateResult:
        rl = self._config.rl
        count = len(micro_batches)

        def forward(model: Any, rows: Rows) -> tuple[Tensor, Callable]:
            log_probs_BL, entropy_BL = self._log_probs(model, rows)

            def loss_function(log_probs_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss, metrics = grpo_loss(
                    log_probs_BL,
                    _rows_of(old, rows, log_probs_BL) if old else rows.rollout_log_probs_BL,
                    _rows_of(reference, rows, log_probs_BL) if reference else None,
                    rows.advantages_B,
                    rows.mask_BL,
                    num_answers=num_answers,
                    epsilon=rl.clip_epsilon,
                    kl_coefficient=rl.kl_coefficient,
                    level=rl.loss_level,
                )
                gap_BL = (log_probs_BL.detach() - rows.rollout_log_probs_BL).abs().where(rows.mask_BL, 0.0)
                entropy = entropy_BL.where(rows.mask_BL, 0.0).sum()
                extra = {"logprob_gap": gap_BL.max(), "entropy": entropy, "tokens": rows.mask_BL.sum()}
                # The mean over micro-batches that megatron-core takes must come out as their sum.
                return loss * count, metrics | extra

            return log_probs_BL, loss_function

        longest = max(rows.inputs_BL.shape[1] for rows in micro_batches)
        return update(self._model, self._optimizer, micro_batches, forward, rate, longest)


def _rows_of(per_sample: list[Tensor], rows: Rows, like_BL: Tensor) -> Tensor:
    """Log-probabilities kept by sample, as rows of this micro-batch."""
    result_BL = torch.zeros_like(like_BL)
    for row, place in enumerate(rows.samples_B.tolist()):
        length = min(result_BL.shape[1], len(per_sample[place]))
        result_BL[row, :length] = per_sample[place][:length]
    return result_BL


def _combined(results: Sequence[UpdateResult]) -> dict[str, Any]:
    """Metrics of a rollout: means over its updates; the engine's gap is that of the first, before weights moved."""
    summed = []
    for result in results:
        keys = result.passes.logged[0].keys() - {"logprob_gap"}
        summed.append({key: float(sum(entry[key] for entry in result.passes.logged)) for key in keys})
    row = {key: sum(entry[key] for entry in summed) / len(summed) for key in sorted(summed[0])}
    row["entropy"] /= row.pop("tokens")
    row["logprob_gap"] = max(float(entry["logprob_gap"]) for entry in results[0].passes.logged)
    norms = [result.gradient_norm for result in results if not result.skipped]
    row["gradient_norm"] = sum(norms) / len(norms) if norms else float("nan")
    row["skipped"] = sum(result.skipped for result in results)
    return row
