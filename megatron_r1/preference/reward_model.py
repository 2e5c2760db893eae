"""A reward model: its losses on scores and critiques in training, and its scores at inference.

The loss of a pair is -log sigmoid(chosen score - rejected score) (Bradley-Terry), that of a labelled response the
cross-entropy of sigmoid(score): DeepSeek-R1 report (v2), section 3.1. A critique before the end token is trained by
next-token cross-entropy, so that the head scores after reasoning (DeepSeek-V3 report, 5.2.1).

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
from megatron_r1.model.fp8.tokens import token_multiple
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
    """1 where the label is in the loss: a token of the critique, or of a policy's response; else 0."""
    ends_B: Tensor
    """Position of each sequence's last token."""
    safe_I: Tensor
    """1 or 0; unused for pairs."""
    token_weight: float = 0.0
    """Weight of a critique token's loss: the mean over micro-batches and ranks is the mean over all such tokens."""


def reward_micro_batch(
    sequences: Sequence[TokenizedSequence], pad: int, device: str, multiple: int
) -> RewardMicroBatch:
    """Sequences as padded tensors.

    Args:
        multiple: the padded length is a multiple of this.
    """
    longest = -(-max(len(sequence.tokens) for sequence in sequences) // multiple) * multiple
    tokens_BL = torch.full((len(sequences), longest + 1), pad, dtype=torch.long)
    loss_mask_BL = torch.zeros(len(sequences), longest)
    for index, sequence in enumerate(sequences):
        tokens_BL[index, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        loss_mask_BL[index, sequence.loss_start - 1 : len(sequence.tokens) - 1] = 1.0
    return RewardMicroBatch(
        tokens_BL[:, :-1].contiguous().to(device),
        tokens_BL[:, 1:].contiguous().to(device),
        loss_mask_BL.to(device),
        torch.tensor([len(sequence.tokens) - 1 for sequence in sequences], device=device),
        torch.empty(0),
    )


class RewardModel:
    """A model with a scalar head on its last stage."""

    def __init__(self, model: Model, pairwise: bool, critique_weight: float, pad: int, device: str):
        """
        Args:
            model: the bare model, its head attached.
            pairwise: whether sequences come in pairs.
            critique_weight: weight of the token loss on critiques.
        """
        self._model, self._pairwise, self._critique_weight = model, pairwise, critique_weight
        self._pad, self._device = pad, device

    def micro_batches(
        self, examples: Sequence[TokenizedPreference], rank: int, ranks: int, size: int
    ) -> list[RewardMicroBatch]:
        """This data-parallel rank's share of a global batch.

        Args:
            size: examples of a micro-batch.
        """
        mine = examples[rank::ranks]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        critique_tokens = sum(
            len(sequence.tokens) - sequence.loss_start for example in examples for sequence in example.sequences
        )
        weight = len(parts) * ranks / max(1, critique_tokens)
        return [self._micro_batch(part, weight) for part in parts]

    def _micro_batch(self, examples: Sequence[TokenizedPreference], weight: float) -> RewardMicroBatch:
        batch = self._padded([sequence for each in examples for sequence in each.sequences])
        safe_I = torch.tensor([float(each.safe) for each in examples], device=self._device)
        return RewardMicroBatch(batch.inputs_BL, batch.labels_BL, batch.loss_mask_BL, batch.ends_B, safe_I, weight)

    def _padded(self, sequences: Sequence[TokenizedSequence]) -> RewardMicroBatch:
        return reward_micro_batch(sequences, self._pad, self._device, token_multiple(self._model, len(sequences)))

    def forward(self, model: Any, batch: RewardMicroBatch) -> tuple[Tensor, LossFunction]:
        """This stage's output, on the last stage scores and token losses [B, 1 + L], and the loss function of it."""
        return self._run(model, batch, self._scores_and_losses), partial(self._loss, batch)

    def _run(self, model: Any, batch: RewardMicroBatch, read: Callable[..., Tensor]) -> Tensor:
        with without_multi_token_prediction(self._model):
            output: Tensor = model(
                batch.inputs_BL, positions_of(batch.inputs_BL), None, output_processor=partial(read, batch)
            )
            return output

    def _scores(self, batch: RewardMicroBatch, *, hidden_states: Tensor, **_: Any) -> Tensor:
        scores_B: Tensor = head_of(self._model)(hidden_states, batch.ends_B)
        return scores_B

    def _scores_and_losses(
        self,
        batch: RewardMicroBatch,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **_: Any,
    ) -> Tensor:
        scores_B1 = self._scores(batch, hidden_states=hidden_states)[:, None]
        if not self._critique_weight:
            return scores_B1
        logits_LBV, _ = output_layer(hidden_states, weight=output_weight)
        losses_BL = compute_language_model_loss(batch.labels_BL, logits_LBV)
        return torch.cat([scores_B1, losses_BL.float()], 1)

    def _loss(self, batch: RewardMicroBatch, output_BX: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores_B = output_BX[:, 0]
        if self._pairwise:
            margins_I = scores_B[0::2] - scores_B[1::2]
            losses_I = -F.logsigmoid(margins_I)
        else:
            margins_I = scores_B * (2 * batch.safe_I - 1)
            losses_I = F.binary_cross_entropy_with_logits(scores_B, batch.safe_I, reduction="none")
        score_loss = losses_I.mean()
        logged = {
            "train/score_loss": score_loss.detach(),
            "train/accuracy": pairwise_accuracy(margins_I.detach()).mean(),
            "train/margin": margins_I.detach().mean(),
            "train/score": scores_B.detach().mean(),
        }
        loss = score_loss
        if self._critique_weight:
            critique_loss = (output_BX[:, 1:] * batch.loss_mask_BL).sum() * batch.token_weight
            logged["train/reasoning_loss"] = critique_loss.detach()
            loss = loss + self._critique_weight * critique_loss
        return loss, {**logged, "train/loss": loss.detach()}

    def scores(self, sequences: Sequence[Sequence[int]], size: int) -> list[float]:
        """The score of each token sequence, read at its last token; the same on every stage.

        Collective over all ranks. Ranks of one model replica pass the same sequences; replicas may pass different ones,
        or none.

        Args:
            size: sequences of a forward pass.
        """
        return self._read(sequences, size, self._scores) or []

    def generate_critiques(
        self, sequences: Sequence[Sequence[int]], size: int, end: int, max_tokens: int
    ) -> list[list[int]]:
        """Token sequences, each followed by the model's own greedy critique and the end token.

        Collective, as `scores`. Every token costs a forward pass over its whole sequence: slow, but it works in any
        layout of ranks.

        Args:
            max_tokens: length at which a critique is cut off.
        """
        result = [list(sequence) for sequence in sequences]
        unfinished = list(range(len(sequences)))
        for _ in range(max_tokens):
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
        batch: RewardMicroBatch,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        **_: Any,
    ) -> Tensor:
        logits_LBV, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=True)
        last_BV: Tensor = logits_LBV[batch.ends_B, torch.arange(len(batch.ends_B), device=logits_LBV.device)]
        return last_BV.argmax(-1)

    def _read(self, sequences: Sequence[Sequence[int]], size: int, read: Callable[..., Tensor]) -> list[Any] | None:
        """Values of `read` at the last token of each sequence, the same on every stage; None when no rank has any."""
        tokenized = [TokenizedSequence(list(ids), len(ids)) for ids in sequences]
        parts = [tokenized[start : start + size] for start in range(0, len(tokenized), size)]
        # Experts may be divided among data-parallel ranks, so all run every pass: a rank with fewer sequences pads.
        passes = max(all_gather_data_parallel(len(parts)))
        if not passes:
            return None
        padding = [[TokenizedSequence([self._pad], 1)]] * (passes - len(parts))
        batches = [self._padded(part) for part in (*parts, *padding)]
        length = max(batch.inputs_BL.shape[1] for batch in batches)
        training = self._model.training
        self._model.eval()
        try:
            outputs = forward_only(self._model, batches, partial(self._run, read=read), length)
        finally:
            self._model.train(training)
        return broadcast_from_last_stage([value for values_B in outputs[: len(parts)] for value in values_B.tolist()])


def pairwise_accuracy(margins_I: Tensor) -> Tensor:
    """1 for a margin above 0, 0 for one below, 0.5 for a tie: equal scores everywhere are an accuracy of one half."""
    return (margins_I > 0).float() + 0.5 * (margins_I == 0).float()
