"""Samples as tensors: one row per answer, padded on the right.

Shapes: B answers, L positions, N sparse layers, K experts of a token. Position t of log-probabilities, mask and
targets belongs to token t + 1 of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_r1.model.replay import NOT_RECORDED
from megatron_r1.rollout.sample import Sample


@dataclass(frozen=True)
class ResponseBatch:
    """A micro-batch of answers."""

    tokens_BL: Tensor
    """Prompt, response, padding; the last token is a target only."""
    mask_BL: Tensor
    """Whether the target at this position is learned from: it is part of the response."""
    rollout_log_probs_BL: Tensor
    """The engine's log-probabilities; 0 outside the response."""
    samples_B: Tensor
    """Place of each row's sample in the rollout."""
    experts_BLNK: Tensor | None = None
    """Where the engine sent each input, by sparse layer; `NOT_TOLD` where that is not known. None where no row is."""

    @property
    def inputs_BL(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        return self.tokens_BL[:, :-1]

    @property
    def targets_BL(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        return self.tokens_BL[:, 1:]

    def masked(self) -> ResponseBatch:
        """The same rows with nothing to learn from: they only keep the other ranks company."""
        return replace(self, mask_BL=torch.zeros_like(self.mask_BL))


def num_tokens(sample: Sample) -> int:
    """Tokens of a sample's row without padding."""
    return len(sample.prompt_tokens) + len(sample.response_tokens)


def response_part(sample: Sample, values_L: Tensor) -> Tensor:
    """The part of a row that is of the answer's tokens, whether they are learned from or not."""
    return values_L[len(sample.prompt_tokens) - 1 : num_tokens(sample) - 1]


def to_positions(sample: Sample, values_R: Tensor) -> Tensor:
    """Values of an answer's tokens, and of padding after them, at the positions of its row, [L]; 0 before it."""
    row_L = values_R.new_zeros(num_tokens(sample) - 1)
    response_part(sample, row_L)[:] = values_R[: len(sample.response_tokens)]
    return row_L


def make_batch(
    samples: Sequence[Sample],
    indices: Sequence[int],
    pad_token: int,
    device: str,
    length_multiple: int = 1,
) -> ResponseBatch:
    """Rows of the samples at `indices` of a rollout.

    Args:
        length_multiple: inputs are padded to a multiple of this.
    """
    chosen = [samples[index] for index in indices]
    inputs = max(map(num_tokens, chosen)) - 1
    longest = -(-inputs // length_multiple) * length_multiple + 1
    tokens_BL = torch.full((len(chosen), longest), pad_token, dtype=torch.long)
    mask_BL = torch.zeros(len(chosen), longest - 1, dtype=torch.bool)
    log_probs_BL = torch.zeros(len(chosen), longest - 1)
    for row, sample in enumerate(chosen):
        start, end = len(sample.prompt_tokens), num_tokens(sample)
        tokens_BL[row, :end] = torch.tensor(sample.prompt_tokens + sample.response_tokens)
        mask_BL[row, start - 1 : end - 1] = sample.in_loss
        log_probs_BL[row, start - 1 : end - 1] = torch.tensor(sample.logprobs)
    experts_BLNK = _experts(chosen, longest - 1)
    return ResponseBatch(
        tokens_BL.to(device),
        mask_BL.to(device),
        log_probs_BL.to(device),
        torch.tensor(list(indices)),
        None if experts_BLNK is None else experts_BLNK.to(device),
    )


def _experts(samples: Sequence[Sample], length: int) -> Tensor | None:
    told = [sample.routed_experts for sample in samples]
    shape = next((experts.shape[1:] for experts in told if experts), None)
    if shape is None:
        return None
    experts_BLNK = torch.full((len(samples), length, *shape), NOT_RECORDED)
    for row, experts in enumerate(told):
        if experts:
            experts_BLNK[row, : experts.shape[0]] = torch.from_numpy(experts.array())
    return experts_BLNK
