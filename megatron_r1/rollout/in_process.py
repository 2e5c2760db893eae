"""The engine in the trainer's process: static batches with early ends, decoded by `megatron_r1.model.decode`.

It samples from the trainer's own weights, so no sync is needed, and its samples depend only on the seed. It is for unit
tests and machines without SGLang.

Shapes: B sequences of a batch, R of them still decoded, U unlike prompts, L positions, T response tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_r1.model.decode import Cache, Decoder
from megatron_r1.model.replay import Replay
from megatron_r1.rollout.engine import Completion, Request, Response, Sampling, check_lengths, int32
from megatron_r1.rollout.routed_experts import narrowed

Routes = Callable[[], Tensor]
"""Gives the experts [tokens, N, K] of the last forward pass."""
OPEN_SHARE = 0.75
"""Ended sequences leave the batch, which copies its cache, when at most this share of it is still open."""


class LocalEngine:
    """Samples from a megatron-core model of this process: a `RolloutEngine`, and its own `WeightSync`."""

    def __init__(self, model: GPTModel, batch_size: int, pad_token: int, routing: Replay | None = None):
        """
        Args:
            model: the model to sample from; each call uses its current weights.
            batch_size: sequences decoded at a time.
            pad_token: fills the left of shorter prompts; attention masks it.
            routing: of the model's routers, where completions record their experts.
        """
        self._model, self._batch_size, self._pad, self._routing = model, batch_size, pad_token, routing
        self._version = "0"
        self.busy_seconds = 0.0

    def push(self, version: str) -> None:
        """Note the version: the engine reads the trainer's own weights."""
        self._version = version

    def abandon(self) -> None:
        """Only the caller's own thread may be in `generate`."""

    def health(self) -> dict[str, int]:
        """Empty: nothing is sent, so nothing can fail or restart."""
        return {}

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in the order of the requests."""
        check_lengths(requests, sampling, self._model.max_sequence_length)
        began = time.monotonic()
        generator = torch.Generator().manual_seed(sampling.seed)
        # Prompts of similar length share a batch; equal prompts stay together and are prefilled once.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_tokens), requests[i].prompt_tokens))
        completions: dict[int, Completion] = {}
        with torch.inference_mode():
            decoder = Decoder(self._model)
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                batch = _Batch([requests[i] for i in rows], sampling, generator, self._pad, self._device)
                with self._routing.recording() if self._routing and sampling.routed else nullcontext() as routes:
                    batch.decode(decoder, routes)
                completions.update(zip(rows, batch.completions(self._version), strict=True))
        self.busy_seconds += time.monotonic() - began
        return [completions[i] for i in range(len(requests))]

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device


class _Batch:
    """Responses that are decoded together.

    Prompts are padded on the left, so that the next token of every sequence has the same position; rotary positions
    are relative, so the shift changes nothing, and padded positions are masked.
    """

    def __init__(
        self, requests: list[Request], sampling: Sampling, generator: torch.Generator, pad: int, device: torch.device
    ):
        self._requests, self._sampling, self._pad, self._device = requests, sampling, pad, device
        self._unlike = list(dict.fromkeys(request.prompt_tokens for request in requests))
        shape = len(requests), sampling.max_tokens
        # One number for each token that may be drawn: how the batch shrinks does not change what is drawn.
        self._draws_BT = torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
        self._tokens_BT = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs_BT = torch.zeros(shape, device=device)
        self._length_B = torch.full(shape[:1], sampling.max_tokens, device=device)
        self._stopped_B = torch.zeros(shape[:1], dtype=torch.bool, device=device)
        self._prompt_experts: list[np.ndarray] = []
        """Of each unlike prompt the experts [tokens, N, K] of its tokens."""
        self._experts: list[list[np.ndarray]] = [[] for _ in requests]
        """Of each response the experts [N, K] of its tokens that were read."""

    def decode(self, decoder: Decoder, routes: Routes | None) -> None:
        """Draw tokens until every response has ended."""
        sampling = self._sampling
        stops = torch.tensor(sampling.stop_tokens, device=self._device)
        logits_RV, cache = self._prefill(decoder, routes)
        row_R = torch.arange(len(self._requests), device=self._device)
        for step in range(sampling.max_tokens):
            token_R, logprob_R = draw(logits_RV, sampling, self._draws_BT[row_R, step])
            self._tokens_BT[row_R, step], self._logprobs_BT[row_R, step] = token_R, logprob_R
            ended_R = torch.isin(token_R, stops) & ~self._stopped_B[row_R]
            self._length_B[row_R[ended_R]] = step + 1
            self._stopped_B[row_R[ended_R]] = True
            (open_R,) = (~self._stopped_B[row_R]).nonzero(as_tuple=True)
            if not len(open_R) or step + 1 == sampling.max_tokens:
                break
            if len(open_R) <= OPEN_SHARE * len(row_R):
                cache, row_R, token_R = cache.select(open_R), row_R[open_R], token_R[open_R]
            logits_RV = decoder.logits(token_R[:, None], cache)
            if routes:
                for row, experts in zip(row_R.tolist(), routes().cpu().numpy(), strict=True):
                    self._experts[row].append(experts)

    def _prefill(self, decoder: Decoder, routes: Routes | None) -> tuple[Tensor, Cache]:
        """Logits after each prompt and the cache; equal prompts are read once."""
        longest = max(map(len, self._unlike))
        padding = [longest - len(prompt) for prompt in self._unlike]
        tokens = [[self._pad] * count + list(prompt) for count, prompt in zip(padding, self._unlike, strict=True)]
        cache = Cache(longest + self._sampling.max_tokens, torch.tensor(padding, device=self._device))
        logits_UV = decoder.logits(torch.tensor(tokens, device=self._device), cache)
        if routes:
            read = routes().unflatten(0, (len(tokens), longest)).cpu().numpy()
            self._prompt_experts = [experts[count:] for count, experts in zip(padding, read, strict=True)]
        unlike_B = torch.tensor(self._unlike_of_requests(), device=self._device)
        return logits_UV[unlike_B], cache.select(unlike_B)

    def _unlike_of_requests(self) -> list[int]:
        """Index of each request's prompt among the unlike ones."""
        index_of = {prompt: index for index, prompt in enumerate(self._unlike)}
        return [index_of[request.prompt_tokens] for request in self._requests]

    def completions(self, version: str) -> Iterator[Completion]:
        """The responses, in the order of the requests."""
        lengths, stopped = self._length_B.tolist(), self._stopped_B.tolist()
        tokens_BT = self._tokens_BT.cpu().numpy().astype(np.int32)
        logprobs_BT = self._logprobs_BT.cpu().numpy().astype(np.float32)
        prompts = self._unlike_of_requests()
        for row, request in enumerate(self._requests):
            length, experts = lengths[row], None
            if self._prompt_experts:
                # The last token of a response was not read.
                read = [*self._prompt_experts[prompts[row]], *self._experts[row][: length - 1]]
                experts = narrowed(np.stack(read))
            own = tokens_BT[row, :length].copy(), logprobs_BT[row, :length].copy()
            response = Response(int32(request.prompt_tokens), *own, experts)
            yield Completion(request.id, response, "stop" if stopped[row] else "length", version)


def draw(logits_BV: Tensor, sampling: Sampling, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per sequence, by the inverse of the cumulative distribution.

    Args:
        draws_B: uniform in [0, 1).

    Returns:
        Tokens [B] and their log-probabilities [B] under the tempered distribution, before the nucleus is cut; under
        the plain distribution when the draw is greedy.
    """
    if sampling.temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B, _logprobs(logits_BV, token_B)
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    probs_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    below_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    # The first token whose cumulative probability is above the draw; one without probability is never the first.
    token_B = torch.searchsorted(below_BV, draws_B[:, None] * below_BV[:, -1:], right=True)[:, 0]
    token_B.clamp_(max=logits_BV.shape[1] - 1)
    return token_B, _logprobs(logits_BV, token_B)


def _logprobs(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    return logits_BV.gather(-1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
