"""Log-probabilities of answers under a model, on any layout.

Shapes: B answers of a micro-batch, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.passes import forward_only
from megatron_r1.model.replay import RoutingReplay
from megatron_r1.parallel.mesh import tensor_parallel_group
from megatron_r1.rl.logprob import token_log_probs
from megatron_r1.rl.rows import Rows


class Policy:
    """A model as a distribution over answers."""

    def __init__(self, model: torch.nn.Module, temperature: float, replay: RoutingReplay | None = None):
        """
        Args:
            temperature: as the engine samples with.
            replay: lets routers take the experts that the engine took; None lets them choose.
        """
        self._model, self._temperature, self._replay = model, temperature, replay

    def output(self, model: Any, rows: Rows) -> Tensor:
        """This stage's output: hidden states for the next one, logits [B, L, V / TP] on the last.

        Args:
            model: the model in whatever wrapping the schedule has it.
        """
        positions_BL = torch.arange(rows.inputs_BL.shape[1], device=rows.tokens_BL.device).expand_as(rows.inputs_BL)
        with self._telling(rows), without_multi_token_prediction(self._model):
            return model(rows.inputs_BL.contiguous(), positions_BL, None)

    def _telling(self, rows: Rows) -> AbstractContextManager[None]:
        if self._replay is None or rows.experts_BLNK is None:
            return nullcontext()
        return self._replay.telling(rows.experts_BLNK, backward=torch.is_grad_enabled())

    def log_probs(self, logits_BLV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, L] of the rows' targets, and the entropy [B, L]."""
        return token_log_probs(logits_BLV, rows.targets_BL, self._temperature, tensor_parallel_group())

    def log_probs_by_sample(self, micro_batches: Sequence[Rows]) -> dict[int, Tensor]:
        """Each sample's row of log-probabilities under the weights as they stand, without gradient.

        Empty but on the last pipeline stage.
        """

        def forward(model: Any, rows: Rows) -> Tensor:
            output = self.output(model, rows)
            return self.log_probs(output, rows)[0] if model.post_process else output

        outputs = forward_only(self._model, micro_batches, forward, longest_input(micro_batches))
        result: dict[int, Tensor] = {}
        for rows, log_probs_BL in zip(micro_batches, outputs, strict=False):
            result |= zip(rows.samples_B.tolist(), log_probs_BL, strict=True)
        return result


def longest_input(micro_batches: Sequence[Rows]) -> int:
    """Tokens of the longest input row."""
    return max(rows.inputs_BL.shape[1] for rows in micro_batches)


def as_rows(by_sample: dict[int, Tensor], rows: Rows, like_BL: Tensor) -> Tensor:
    """Log-probabilities kept by sample, as rows of this micro-batch, 0 beyond what was kept."""
    result_BL = torch.zeros_like(like_BL)
    for row, sample in enumerate(rows.samples_B.tolist()):
        length = min(result_BL.shape[1], len(by_sample[sample]))
        result_BL[row, :length] = by_sample[sample][:length]
    return result_BL
