"""A saved batch, and a model's log-probabilities of its responses under a possible cause of the mismatch.

Shapes: B responses, L positions, T input tokens of one response, N sparse layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_r1.model.replay import RoutingReplay
from megatron_r1.rl.objective.kl import k3
from megatron_r1.rl.policy.batch import ResponseBatch, make_batch, num_tokens, response_part
from megatron_r1.rl.policy.policy import Policy
from megatron_r1.rollout.engine import int32
from megatron_r1.rollout.sample import Sample, response_of
from megatron_r1.train.batching import micro_batches_by_tokens

Change = Callable[[Sample], Sample]


class Gap(NamedTuple):
    """Differences between a model's log-probabilities and the saved ones, in nats."""

    mean: float
    """Of absolute differences, over tokens."""
    largest: float
    k1: float
    """Mean of saved minus computed: an estimate of KL(engine || trainer)."""
    k3: float
    """The never negative estimate of the same."""


class Trial:
    """The trainer's model and the saved batch."""

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        temperature: float,
        pad_token: int,
        tokens_per_micro_batch: int,
        replay: RoutingReplay | None,
    ):
        """
        Args:
            model: the trainer's, on one rank.
            samples: saved responses, with the engine's log-probabilities.
            temperature: the configured sampling temperature.
            replay: routing replay of the model's routers; None for a model without routers.
        """
        self.model, self.samples, self.temperature, self.replay = model, list(samples), temperature, replay
        self._pad, self._tokens = pad_token, tokens_per_micro_batch
        self.saved = [torch.from_numpy(response_of(sample).logprobs) for sample in samples]

    def few(self, count: int) -> Trial:
        """The same trial over the first responses only."""
        return Trial(self.model, self.samples[:count], self.temperature, self._pad, self._tokens, self.replay)

    def log_probs(
        self, temperature: float | None = None, change: Change | None = None, replayed: bool = False
    ) -> list[Tensor]:
        """Log-probabilities of each response's tokens under the current weights.

        Args:
            change: replaces each sample by another one with the same response.
            replayed: whether routers use the engine's experts where they were recorded.
        """
        policy = Policy(self.model, temperature or self.temperature, self.replay if replayed else None)
        samples = [change(sample) for sample in self.samples] if change else self.samples
        found = policy.logprobs_by_sample([self._batch(samples, part) for part in self._parts(samples)])
        return [response_part(sample, found[index]).cpu() for index, sample in enumerate(samples)]

    def gap(self, log_probs: Sequence[Tensor]) -> Gap:
        """Between these log-probabilities and the saved ones."""
        saved, computed = torch.cat(self.saved), torch.cat(list(log_probs))
        difference = saved - computed
        return Gap(
            float(difference.abs().mean()), float(difference.abs().max()), float(difference.mean()),
            float(k3(saved, computed).mean()),
        )  # fmt: skip

    def experts(self) -> list[Tensor]:
        """The experts [T, N, K] that the model's own routers choose for each response's inputs."""
        assert self.replay is not None
        policy, found = Policy(self.model, self.temperature), dict[int, Tensor]()
        for part in self._parts(self.samples):
            batch = self._batch(self.samples, part)
            with self.replay.recording() as routes:
                policy.logprobs_by_sample([batch])
                found |= {index: experts_LNK.cpu() for index, experts_LNK in batch.by_sample(routes()[None]).items()}
        return [found[index] for index in range(len(self.samples))]

    def _parts(self, samples: Sequence[Sample]) -> list[list[int]]:
        return micro_batches_by_tokens([num_tokens(sample) for sample in samples], self._tokens)

    def _batch(self, samples: Sequence[Sample], part: Sequence[int]) -> ResponseBatch:
        device = str(next(self.model.parameters()).device)
        return make_batch(samples, part, self._pad, device)


def with_prompt(sample: Sample, prompt: Sequence[int]) -> Sample:
    """The same response after another prompt, without the recorded experts, which are of other tokens."""
    response = replace(response_of(sample), prompt_tokens=int32(prompt), routed_experts=None)
    return replace(sample, prompt_length=len(prompt), response=response)


@contextmanager
def replaced(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """The model's tensors hold these values inside the block."""
    before = [tensor.detach().clone() for tensor in values]
    try:
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(values, before, strict=True):
                tensor.copy_(value)
