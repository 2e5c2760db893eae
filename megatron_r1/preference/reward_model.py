"""A reward model: its losses on scores and on the judge's critiques in training, and its scores in use.

A pair's loss is -log sigmoid(chosen score - rejected score) (Bradley-Terry), a labelled response's the cross-entropy of
sigmoid(score): DeepSeek-R1 report (v2), section 3.1. A critique before the end token is trained by next-token
cross-entropy, so that the head scores after reasoning (DeepSeek-V3 report, 5.2.1).

Shapes: I examples of a micro-batch, B sequences (two to a pair, the chosen first), L positions, D model width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.data.preference.examples import TokenizedPreference, TokenizedSequence
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import LossFunction, forward_only
from megatron_r1.model.reward_head import head_of
from megatron_r1.parallel.context import positions_of
from megatron_r1.parallel.mesh import all_gather_data_parallel, broadcast_from_last_stage


@dataclass(frozen=True)
class RewardMicroBatch:
    """A micro-batch of labelled responses, padded on the right."""

    inputs_BL: Tensor
    labels_BL: Tensor
    """The token after each input; padding after the last."""
    loss_mask_BL: Tensor
    """1 where the label belongs to the judge's critique, else 0."""
    ends_B: Tensor
    """Position of each sequence's last token."""
    safe_I: Tensor
    """1 or 0; unused for pairs."""
    token_weight: float = 0.0
    """Of one critique token's loss; the mean over micro-batches and ranks is then the mean over all such tokens."""


def reward_micro_batch(rows: Sequence[TokenizedSequence], pad: int, device: str, multiple: int) -> RewardMicroBatch:
    """Sequences as tensors.

    Args:
        multiple: their common length is a multiple of this.
    """
    longest = -(-max(len(row.tokens) for row in rows) // multiple) * multiple
    tokens_BL = torch.full((len(rows), longest + 1), pad, dtype=torch.long)
    loss_mask_BL = torch.zeros(len(rows), longest)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row.tokens)] = torch.tensor(row.tokens)
        loss_mask_BL[index, row.loss_start - 1 : len(row.tokens) - 1] = 1.0
    return RewardMicroBatch(
        tokens_BL[:, :-1].contiguous().to(device),
        tokens_BL[:, 1:].contiguous().to(device),
        loss_mask_BL.to(device),
        torch.tensor([len(row.tokens) - 1 for row in rows], device=device),
        torch.empty(0),
    )


class RewardModel:
    """A model with a scalar head on its last stage."""

    def __init__(self, model: Model, pairwise: bool, reasoning_weight: float, pad: int, device: str, multiple: int = 1):
        """
        Args:
            model: the bare model, its head attached.
            pairwise: whether sequences come in pairs.
            reasoning_weight: of the token loss on the judge's critique.
            multiple: tensor-parallel ranks, among which a sequence's positions are divided.
        """
        self._model, self._pairwise, self._reasoning_weight = model, pairwise, reasoning_weight
        self._pad, self._device, self._multiple = pad, device, multiple

    def micro_batches(
        self, examples: Sequence[TokenizedPreference], rank: int, ranks: int, size: int
    ) -> list[RewardMicroBatch]:
        """This data-parallel rank's share of a global batch.

        Args:
            size: examples of a micro-batch.
        """
        mine = examples[rank::ranks]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        critique_tokens = sum(len(row.tokens) - row.loss_start for example in examples for row in example.sequences)
        weight = len(parts) * ranks / max(1, critique_tokens)
        return [self._micro_batch(part, weight) for part in parts]

    def _micro_batch(self, examples: Sequence[TokenizedPreference], weight: float) -> RewardMicroBatch:
        rows = reward_micro_batch(
            [row for each in examples for row in each.sequences], self._pad, self._device, self._multiple
        )
        safe_I = torch.tensor([float(each.safe) for each in examples], device=self._device)
        return RewardMicroBatch(rows.inputs_BL, rows.labels_BL, rows.loss_mask_BL, rows.ends_B, safe_I, weight)

    def forward(self, model: Any, rows: RewardMicroBatch) -> tuple[Tensor, LossFunction]:
        """This stage's output, and what makes a loss of the last one's: scores and token losses, [B, 1 + L]."""
        return self._run(model, rows, self._scores_and_losses), partial(self._loss, rows)

    def _run(self, model: Any, rows: RewardMicroBatch, read: Callable[..., Tensor]) -> Tensor:
        with without_multi_token_prediction(self._model):
            output: Tensor = model(
                rows.inputs_BL, positions_of(rows.inputs_BL), None, output_processor=partial(read, rows)
            )
            return output

    def _scores(self, rows: RewardMicroBatch, *, hidden_states: Tensor, **_: Any) -> Tensor:
        scores_B: Tensor = head_of(self._model)(hidden_states, rows.ends_B)
        return scores_B

    def _scores_and_losses(
        self,
        rows: RewardMicroBatch,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **_: Any,
    ) -> Tensor:
        scores_B1 = self._scores(rows, hidden_states=hidden_states)[:, None]
        if not self._reasoning_weight:
            return scores_B1
        logits_LBV, _ = output_layer(hidden_states, weight=output_weight)
        losses_BL = compute_language_model_loss(rows.labels_BL, logits_LBV)
        return torch.cat([scores_B1, losses_BL.float()], 1)

    def _loss(self, rows: RewardMicroBatch, output_BX: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores_B = output_BX[:, 0]
        if self._pairwise:
            margins_I = scores_B[0::2] - scores_B[1::2]
            losses_I = -F.logsigmoid(margins_I)
        else:
            margins_I = scores_B * (2 * rows.safe_I - 1)
            losses_I = F.binary_cross_entropy_with_logits(scores_B, rows.safe_I, reduction="none")
        score_loss = losses_I.mean()
        logged = {
            "train/score_loss": score_loss.detach(),
            "train/accuracy": pairwise_accuracy(margins_I.detach()).mean(),
            "train/margin": margins_I.detach().mean(),
            "train/score": scores_B.detach().mean(),
        }
        loss = score_loss
        if self._reasoning_weight:
            reasoning_loss = (output_BX[:, 1:] * rows.loss_mask_BL).sum() * rows.token_weight
            logged["train/reasoning_loss"] = reasoning_loss.detach()
            loss = loss + self._reasoning_weight * reasoning_loss
        return loss, {**logged, "train/loss": loss.detach()}

    def scores(self, rows: Sequence[Sequence[int]], size: int) -> list[float]:
        """The score of each token sequence, read at its last token; the same on every stage.

        Collective over all ranks: those of one data-parallel rank pass the same sequences, others their own, or none.

        Args:
            size: sequences of a forward pass.
        """
        return self._read(rows, size, self._scores) or []

    def generate_critiques(self, rows: Sequence[Sequence[int]], size: int, end: int, longest: int) -> list[list[int]]:
        """Token sequences, each followed by the model's own greedy critique and the end token.

        Collective, as `scores`. Every token costs a pass over its whole sequence, which any layout of ranks can do.

        Args:
            longest: tokens of a critique after which it is ended.
        """
        result = [list(row) for row in rows]
        unfinished = list(range(len(rows)))
        for _ in range(longest):
            chosen = self._read([result[index] for index in unfinished], size, self._next_tokens)
            if chosen is None:
                break
            for index, token in zip(unfinished, chosen, strict=True):
                result[index].append(token)
            unfinished = [index for index, token in zip(unfinished, chosen, strict=True) if token != end]
        for index in unfinished:
            result[index].append(end)
        return result

    def _next_tokens(
        self,
        rows: RewardMicroBatch,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        **_: Any,
    ) -> Tensor:
        logits_LBV, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=True)
        last_BV: Tensor = logits_LBV[rows.ends_B, torch.arange(len(rows.ends_B), device=logits_LBV.device)]
        return last_BV.argmax(-1)

    def _read(self, rows: Sequence[Sequence[int]], size: int, read: Callable[..., Tensor]) -> list[Any] | None:
        """What `read` gives at the last token of each sequence, the same on every stage; None when no rank has any."""
        pad_to_batch = [TokenizedSequence(list(row), len(row)) for row in rows]
        parts = [pad_to_batch[start : start + size] for start in range(0, len(pad_to_batch), size)]
        # Data-parallel ranks may share experts, so all of them run each pass: a rank with fewer sequences runs padding.
        passes = max(all_gather_data_parallel(len(parts)))
        if not passes:
            return None
        padding = [[TokenizedSequence([self._pad], 1)]] * (passes - len(parts))
        batches = [reward_micro_batch(part, self._pad, self._device, self._multiple) for part in (*parts, *padding)]
        length = max(batch.inputs_BL.shape[1] for batch in batches)
        training = self._model.training
        self._model.eval()
        try:
            outputs = forward_only(self._model, batches, partial(self._run, read=read), length)
        finally:
            self._model.train(training)
        return broadcast_from_last_stage([value for values_B in outputs[: len(parts)] for value in values_B.tolist()])


def pairwise_accuracy(margins_I: Tensor) -> Tensor:
    """1 for a margin above 0, 0 for one below, half for a tie: a model that gives equal scores is half right."""
    return (margins_I > 0).float() + 0.5 * (margins_I == 0).float()
