"""A saved batch, and the log-probabilities that a model gives its answers under changed circumstances.

Shapes: B answers, L positions, T input tokens of one answer, N sparse layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_r1.model.replay import RoutingReplay
from megatron_r1.rl.batching import micro_batches_by_tokens
from megatron_r1.rl.objective.kl import k3
from megatron_r1.rl.policy.batch import ResponseBatch, make_batch, num_tokens, response_part
from megatron_r1.rl.policy.policy import Policy
from megatron_r1.rollout.sample import Sample

Change = Callable[[Sample], Sample]


class Gap(NamedTuple):
    """How far a model's log-probabilities are from those that were saved, in nats."""

    mean: float
    """Of absolute differences, over tokens."""
    largest: float
    k1: float
    """Mean of saved minus computed: an estimate of KL(engine || trainer)."""
    k3: float
    """The never negative estimate of the same."""


class Trial:
    """The model that is asked, and the batch that it is asked about."""

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
            samples: saved answers, with the engine's log-probabilities.
            temperature: that they are said to have been sampled with.
            replay: of the model's routers; None where it has none.
        """
        self.model, self.samples, self.temperature, self.replay = model, list(samples), temperature, replay
        self._pad, self._tokens = pad_token, tokens_per_micro_batch
        self.saved = [torch.tensor(sample.logprobs) for sample in samples]

    def few(self, count: int) -> Trial:
        """The same trial over the first answers only."""
        return Trial(self.model, self.samples[:count], self.temperature, self._pad, self._tokens, self.replay)

    def log_probs(
        self, temperature: float | None = None, change: Change | None = None, replayed: bool = False
    ) -> list[Tensor]:
        """Of each answer's tokens, by the weights as they stand.

        Args:
            change: makes another sample of each, with the same response.
            replayed: routers take the experts that the engine took, where they are saved.
        """
        policy = Policy(self.model, temperature or self.temperature, self.replay if replayed else None)
        samples = [change(sample) for sample in self.samples] if change else self.samples
        found = policy.logprobs_by_sample([self._batch(samples, part) for part in self._parts(samples)])
        return [response_part(sample, found[place]).cpu() for place, sample in enumerate(samples)]

    def gap(self, log_probs: Sequence[Tensor]) -> Gap:
        """Of these log-probabilities from the saved ones."""
        saved, computed = torch.cat(self.saved), torch.cat(list(log_probs))
        difference = saved - computed
        return Gap(
            float(difference.abs().mean()), float(difference.abs().max()), float(difference.mean()),
            float(k3(saved, computed).mean()),
        )  # fmt: skip

    def experts(self) -> list[Tensor]:
        """The experts [T, N, K] that the model's own routers choose for each answer's inputs."""
        assert self.replay is not None
        policy, found = Policy(self.model, self.temperature), dict[int, Tensor]()
        for part in self._parts(self.samples):
            batch = self._batch(self.samples, part)
            with self.replay.recording() as routes:
                policy.logprobs_by_sample([batch])
                experts_BLNK = routes().unflatten(0, (-1, len(part))).transpose(0, 1)
            for place, experts_LNK in zip(part, experts_BLNK, strict=True):
                found[place] = experts_LNK[: num_tokens(self.samples[place]) - 1].cpu()
        return [found[place] for place in range(len(self.samples))]

    def _parts(self, samples: Sequence[Sample]) -> list[list[int]]:
        return micro_batches_by_tokens([num_tokens(sample) for sample in samples], self._tokens)

    def _batch(self, samples: Sequence[Sample], part: Sequence[int]) -> ResponseBatch:
        device = str(next(self.model.parameters()).device)
        return make_batch(samples, part, self._pad, device)


def with_prompt(sample: Sample, prompt: tuple[int, ...]) -> Sample:
    """The same response after another prompt; its saved experts are of other tokens, and left out."""
    return replace(sample, prompt_tokens=prompt, routed_experts=None)


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
