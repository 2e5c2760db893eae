"""Samples as padded tensors: one row per response, padded on the right; and values of samples between passes.

Shapes: B responses, L positions, D width, N sparse layers, K experts of a token. Position t of log-probabilities, mask
and targets belongs to token t + 1 of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_r1.model.replay import NOT_RECORDED
from megatron_r1.rollout.sample import Sample, response_of

PerSample = dict[int, Tensor]
"""Values of this rank's samples, by a sample's index in the rollout: a number; [L] or [L, D] by position of its row."""


@dataclass(frozen=True)
class ResponseBatch:
    """A micro-batch of responses."""

    tokens_BL: Tensor
    """Prompt, response, padding; the last token is a target only."""
    mask_BL: Tensor
    """Loss mask: whether the target at this position is a response token that is trained on."""
    rollout_logprobs_BL: Tensor
    """The engine's log-probabilities; 0 outside the response."""
    indices_B: Tensor
    """Index in the rollout of each row's sample."""
    experts_BLNK: Tensor | None = None
    """The engine's experts of each input, by sparse layer; `NOT_RECORDED` where unknown. None: no sample has any."""

    @property
    def inputs_BL(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        return self.tokens_BL[:, :-1]

    @property
    def targets_BL(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        return self.tokens_BL[:, 1:]

    def without_loss(self) -> ResponseBatch:
        """The same rows with an empty loss mask: passes over them only take part in the other ranks' collectives."""
        return replace(self, mask_BL=torch.zeros_like(self.mask_BL))

    def gather(self, values: PerSample) -> Tensor:
        """Values of this batch's samples, [B], [B, L] or [B, L, D]; 0 beyond a sample's end."""
        found = [values[index].to(self.tokens_BL.device) for index in self.indices_B.tolist()]
        if not found[0].dim():
            return torch.stack(found)
        length = self.inputs_BL.shape[1]
        result = found[0].new_zeros(len(found), length, *found[0].shape[1:])
        for row, value in enumerate(found):
            result[row, : len(value)] = value[:length]
        return result


def longest_input(micro_batches: Sequence[ResponseBatch]) -> int:
    """Tokens of the longest input row."""
    return max(batch.inputs_BL.shape[1] for batch in micro_batches)


def num_tokens(sample: Sample) -> int:
    """Tokens of prompt and response."""
    return sample.prompt_length + sample.response_length


def response_part(sample: Sample, values_L: Tensor) -> Tensor:
    """The response's part of a sample's row, [R]."""
    return values_L[sample.prompt_length - 1 : num_tokens(sample) - 1]


def at_positions(sample: Sample, values_R: Tensor) -> Tensor:
    """Values of a response's tokens (and of padding after them) at the positions of the sample's row, [L]; else 0."""
    row_L = values_R.new_zeros(num_tokens(sample) - 1)
    response_part(sample, row_L)[:] = values_R[: sample.response_length]
    return row_L


def make_batch(
    samples: Sequence[Sample],
    indices: Sequence[int],
    pad_token: int,
    device: str,
    length_multiple: int = 1,
) -> ResponseBatch:
    """The samples at `indices` of a rollout.

    Args:
        length_multiple: inputs are padded to a multiple of this.
    """
    members = [samples[index] for index in indices]
    inputs = max(map(num_tokens, members)) - 1
    longest = -(-inputs // length_multiple) * length_multiple + 1
    tokens_BL = torch.full((len(members), longest), pad_token, dtype=torch.long)
    mask_BL = torch.zeros(len(members), longest - 1, dtype=torch.bool)
    logprobs_BL = torch.zeros(len(members), longest - 1)
    for row, sample in enumerate(members):
        response, start, end = response_of(sample), sample.prompt_length, num_tokens(sample)
        tokens_BL[row, :start] = torch.from_numpy(response.prompt_tokens)
        tokens_BL[row, start:end] = torch.from_numpy(response.tokens)
        mask_BL[row, start - 1 : end - 1] = sample.in_loss
        logprobs_BL[row, start - 1 : end - 1] = torch.from_numpy(response.logprobs)
    experts_BLNK = _recorded_experts(members, longest - 1)
    return ResponseBatch(
        tokens_BL.to(device),
        mask_BL.to(device),
        logprobs_BL.to(device),
        torch.tensor(list(indices)),
        None if experts_BLNK is None else experts_BLNK.to(device),
    )


def _recorded_experts(samples: Sequence[Sample], length: int) -> Tensor | None:
    recorded = [response_of(sample).routed_experts for sample in samples]
    shape = next((experts.shape[1:] for experts in recorded if experts is not None), None)
    if shape is None:
        return None
    experts_BLNK = torch.full((len(samples), length, *shape), NOT_RECORDED)
    for row, experts in enumerate(recorded):
        if experts is not None:
            experts_BLNK[row, : len(experts)] = torch.from_numpy(experts.astype(np.int64))
    return experts_BLNK
