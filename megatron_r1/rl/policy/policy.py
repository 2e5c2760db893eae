"""Log-probabilities of answers under a model, on any layout.

Shapes: B answers of a micro-batch, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.forward_backward import forward_only
from megatron_r1.model.replay import RoutingReplay
from megatron_r1.model.scores import last_hidden_states, model_scores
from megatron_r1.model.vocab_parallel import ReferenceHidden, TokenScores
from megatron_r1.parallel.context import positions_of
from megatron_r1.parallel.mesh import is_last_stage
from megatron_r1.rl.policy.batch import ResponseBatch


class Policy:
    """A model as a distribution over answers."""

    def __init__(self, model: torch.nn.Module, temperature: float, replay: RoutingReplay | None = None):
        """
        Args:
            temperature: as the engine samples with.
            replay: lets routers take the experts that the engine took; None lets them choose.
        """
        self._model, self._temperature, self._replay = model, temperature, replay

    def scores(self, model: Any, rows: ResponseBatch, other: ReferenceHidden | None = None) -> TokenScores | Tensor:
        """Scores [B, L] of the rows' targets on the last stage; hidden states for the next one on others.

        Args:
            model: the model in whatever wrapping the schedule has it.
            other: another model's hidden states [L, B, D] and head, for the exact divergence to it.
        """
        with self._telling(rows), without_multi_token_prediction(self._model):
            return model_scores(
                model, *inputs_of(rows), rows.targets_BL, temperature=self._temperature, reference=other
            )

    def _telling(self, rows: ResponseBatch) -> AbstractContextManager[None]:
        if self._replay is None or rows.experts_BLNK is None:
            return nullcontext()
        return self._replay.replaying(rows.experts_BLNK, backward=torch.is_grad_enabled())

    def log_probs_by_sample(self, micro_batches: Sequence[ResponseBatch]) -> dict[int, Tensor]:
        """Each sample's row of log-probabilities under the weights as they stand, without gradient.

        Empty but on the last pipeline stage.
        """

        def forward(model: Any, rows: ResponseBatch) -> Tensor:
            output = self.scores(model, rows)
            return output.log_probs if isinstance(output, TokenScores) else output

        return self._by_sample(micro_batches, forward)

    def hidden_by_sample(self, micro_batches: Sequence[ResponseBatch]) -> dict[int, Tensor]:
        """Each sample's last hidden states [L, D], likewise: what the exact divergence to this policy needs."""

        def forward(model: Any, rows: ResponseBatch) -> Tensor:
            with self._telling(rows), without_multi_token_prediction(self._model):
                return last_hidden_states(model, *inputs_of(rows))

        return self._by_sample(micro_batches, forward)

    def divergence_by_sample(
        self, micro_batches: Sequence[ResponseBatch], other: Callable[[ResponseBatch], ReferenceHidden | None]
    ) -> dict[int, Tensor]:
        """Each sample's exact divergence [L] to another model at each position, likewise."""

        def forward(model: Any, rows: ResponseBatch) -> Tensor:
            output = self.scores(model, rows, other(rows) if is_last_stage() else None)
            if not isinstance(output, TokenScores):
                return output
            assert output.divergence is not None
            return output.divergence

        return self._by_sample(micro_batches, forward)

    def _by_sample(
        self, micro_batches: Sequence[ResponseBatch], forward: Callable[[Any, ResponseBatch], Tensor]
    ) -> dict[int, Tensor]:
        return outputs_by_sample(self._model, micro_batches, forward)


def outputs_by_sample(
    model: Any, micro_batches: Sequence[ResponseBatch], forward: Callable[[Any, ResponseBatch], Tensor]
) -> dict[int, Tensor]:
    """Each sample's row of what `forward` gives, [B, L] or [B, L, D]; empty but on the last pipeline stage."""
    outputs = forward_only(model, micro_batches, forward, longest_input(micro_batches))
    result: dict[int, Tensor] = {}
    for rows, output_BL in zip(micro_batches, outputs, strict=False):
        result |= zip(rows.samples_B.tolist(), output_BL, strict=True)
    return result


def inputs_of(rows: ResponseBatch) -> tuple[Tensor, Tensor]:
    """Tokens and positions, [B, L], as a model takes them."""
    return rows.inputs_BL.contiguous(), positions_of(rows.inputs_BL)


def longest_input(micro_batches: Sequence[ResponseBatch]) -> int:
    """Tokens of the longest input row."""
    return max(rows.inputs_BL.shape[1] for rows in micro_batches)


def pad_to_batch(by_sample: dict[int, Tensor], rows: ResponseBatch) -> Tensor:
    """Values kept by sample, [L] or [L, D] each, as rows of this micro-batch, 0 beyond what was kept."""
    kept = [by_sample[sample] for sample in rows.samples_B.tolist()]
    length = rows.inputs_BL.shape[1]
    result = kept[0].new_zeros(len(kept), length, *kept[0].shape[1:])
    for row, values in enumerate(kept):
        result[row, : len(values)] = values[:length]
    return result
