"""Samples as tensors: end to end for the model, one row a response for the objective; values of them between passes.

The model reads the tokens of a micro-batch's responses end to end, with attention kept apart and padding at the end
only; of [L, D] hidden states none belongs to padding. What the objective computes with is one number a token, and has a
row for each response, padded on the right.

Shapes: B responses, L positions of the longest, T inputs of all, padding included, D width, N sparse layers, K experts
of a token. Position t of log-probabilities, mask and targets belongs to token t + 1 of the response's sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_r1.model.forward_backward import packed_seq_params
from megatron_r1.model.replay import NOT_RECORDED
from megatron_r1.rollout.sample import Sample, response_of

PerSample = dict[int, Tensor]
"""Values of this rank's samples, by a sample's index in the rollout: a number; [L] or [L, D] by position."""


@dataclass(frozen=True)
class ResponseBatch:
    """A micro-batch of responses."""

    inputs_1T: Tensor
    """Every sample's tokens but its last, sample after sample, then padding."""
    targets_1T: Tensor
    """The token after each input."""
    lengths: tuple[int, ...]
    """Inputs of each sample."""
    mask_BL: Tensor
    """Loss mask: whether the target at this position is a response token that is trained on."""
    rollout_logprobs_BL: Tensor
    """The engine's log-probabilities; 0 outside the response."""
    indices_B: Tensor
    """Index in the rollout of each row's sample."""
    experts_1TNK: Tensor | None = None
    """The engine's experts of each input, by sparse layer; `NOT_RECORDED` where unknown. None: the rollout has none."""

    @cached_property
    def bounds(self) -> Tensor:
        """First input of each sequence that attends to itself alone, padding being one, and the end: int32 [N + 1]."""
        padding = self.inputs_1T.shape[1] - sum(self.lengths)
        ends = torch.tensor([0, *self.lengths, *[padding] * bool(padding)]).cumsum(0)
        return ends.int().to(self.inputs_1T.device)

    @cached_property
    def positions_1T(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        """Position of each input in its sequence."""
        starts_N, lengths_N = self.bounds[:-1].long(), self.bounds.diff()
        index_T = torch.arange(self.inputs_1T.shape[1], device=self.inputs_1T.device)
        return (index_T - starts_N.repeat_interleave(lengths_N))[None]

    @cached_property
    def packed(self) -> Any:
        """megatron-core's argument that keeps attention inside each sequence."""
        return packed_seq_params(self.bounds)

    @cached_property
    def present_BL(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        """Which positions of the rows are inputs, not padding."""
        index_L = torch.arange(self.mask_BL.shape[1], device=self.mask_BL.device)
        return index_L < torch.tensor(self.lengths, device=self.mask_BL.device)[:, None]

    def without_loss(self) -> ResponseBatch:
        """The same rows with an empty loss mask: passes over them only take part in the other ranks' collectives."""
        return replace(self, mask_BL=torch.zeros_like(self.mask_BL))

    def rows(self, values_1T: Tensor) -> Tensor:
        """Values of the inputs with a row for each response, [B, L]; 0 beyond its end."""
        zeros_BL = values_1T.new_zeros(self.mask_BL.shape)
        return zeros_BL.masked_scatter(self.present_BL, values_1T[:, : sum(self.lengths)])

    def by_sample(self, values_1T: Tensor) -> PerSample:
        """Values of the inputs, [1, T] or [1, T, D], by sample."""
        parts = values_1T[0, : sum(self.lengths)].split(self.lengths)
        return dict(zip(self.indices_B.tolist(), parts, strict=True))

    def gather(self, values: PerSample) -> Tensor:
        """Values of this batch's samples, [B] or [B, L]; 0 beyond a sample's end."""
        found = self._of_samples(values)
        return pad_sequence(found, batch_first=True) if found[0].dim() else torch.stack(found)

    def gather_end_to_end(self, values: PerSample) -> Tensor:
        """Values of this batch's samples by position, as the model reads them: [1, T, D]; 0 at padding."""
        found = self._of_samples(values)
        padding = self.inputs_1T.shape[1] - sum(self.lengths)
        return torch.cat([*found, found[0].new_zeros(padding, *found[0].shape[1:])])[None]

    def _of_samples(self, values: PerSample) -> list[Tensor]:
        return [values[index].to(self.inputs_1T.device) for index in self.indices_B.tolist()]


def most_inputs(micro_batches: Sequence[ResponseBatch]) -> int:
    """Inputs of the largest micro-batch."""
    return max(batch.inputs_1T.shape[1] for batch in micro_batches)


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
        length_multiple: inputs are padded to a multiple of this, once, at the end.
    """
    members = [samples[index] for index in indices]
    responses = [response_of(sample) for sample in members]
    whole = [np.concatenate([response.prompt_tokens, response.tokens]) for response in responses]
    tokens = [torch.from_numpy(tokens_L.astype(np.int64)) for tokens_L in whole]
    inputs_1T, targets_1T = inputs_and_targets(tokens, pad_token, length_multiple)
    in_loss = [torch.full((sample.response_length,), sample.in_loss) for sample in members]
    logprobs = [torch.from_numpy(response.logprobs).to(torch.get_default_dtype()) for response in responses]
    mask_BL, logprobs_BL = (
        pad_sequence([at_positions(*pair) for pair in zip(members, values, strict=True)], batch_first=True)
        for values in (in_loss, logprobs)
    )
    experts_1TNK = _recorded_experts(samples, members, inputs_1T.shape[1])
    return ResponseBatch(
        inputs_1T.to(device),
        targets_1T.to(device),
        tuple(num_tokens(sample) - 1 for sample in members),
        mask_BL.to(device),
        logprobs_BL.to(device),
        torch.tensor(list(indices)),
        None if experts_1TNK is None else experts_1TNK.to(device),
    )


def inputs_and_targets(sequences: Sequence[Tensor], pad_token: int, multiple: int) -> tuple[Tensor, Tensor]:
    """All tokens but the last of each sequence, end to end, and the token after each, [1, T].

    Args:
        multiple: T is padded to a multiple of this.
    """
    count = sum(len(tokens_L) - 1 for tokens_L in sequences)
    padding_T = torch.full((-count % multiple,), pad_token)
    inputs_T = torch.cat([*(tokens_L[:-1] for tokens_L in sequences), padding_T])
    targets_T = torch.cat([*(tokens_L[1:] for tokens_L in sequences), padding_T])
    return inputs_T[None], targets_T[None]


def _recorded_experts(rollout: Sequence[Sample], members: Sequence[Sample], inputs: int) -> Tensor | None:
    """A batch without any has a tensor too where others have: routers in replay do not expect one that has none."""
    recorded = (sample.response.routed_experts for sample in rollout if sample.response)
    shape = next((experts.shape[1:] for experts in recorded if experts is not None), None)
    if shape is None:
        return None
    experts_1TNK = torch.full((1, inputs, *shape), NOT_RECORDED)
    start = 0
    for sample in members:
        if (experts := response_of(sample).routed_experts) is not None:
            experts_1TNK[0, start : start + len(experts)] = torch.from_numpy(experts.astype(np.int64))
        start += num_tokens(sample) - 1
    return experts_1TNK
