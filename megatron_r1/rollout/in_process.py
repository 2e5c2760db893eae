"""The engine in the trainer's process: megatron-core's model and key-value cache, a static batch with early ends.

It samples from the trainer's own weights, so no sync is needed, and its samples depend only on the seed. It is for unit
tests and machines without SGLang.

Shapes: B sequences of the batch, L positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.replay import Replay
from megatron_r1.rollout.engine import Completion, Request, Sampling
from megatron_r1.rollout.routed_experts import RoutedExperts

Routes = Callable[[], Tensor]
"""Gives the experts [T, N, K] of the last forward pass."""


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
        began = time.monotonic()
        generator = torch.Generator().manual_seed(sampling.seed)
        # Prompts of similar length share a batch; equal prompts stay together and are prefilled once.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_tokens), requests[i].prompt_tokens))
        completions: dict[int, Completion] = {}
        training = self._model.training
        self._model.eval()
        with torch.inference_mode(), without_multi_token_prediction(self._model):
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                batch = [requests[i] for i in rows]
                with self._routing.recording() if self._routing and sampling.routed else nullcontext() as routes:
                    responses = list(self._generate_batch(batch, sampling, generator, routes))
                completions.update(zip(rows, responses, strict=True))
        self._model.train(training)
        self.busy_seconds += time.monotonic() - began
        return [completions[i] for i in range(len(requests))]

    def _generate_batch(
        self, requests: list[Request], sampling: Sampling, generator: torch.Generator, routes: Routes | None
    ) -> Iterator[Completion]:
        tokens: list[list[int]] = [[] for _ in requests]
        log_probs: list[list[float]] = [[] for _ in requests]
        reasons = ["length"] * len(requests)
        prompts = [request.prompt_tokens for request in requests]
        batch = _Batch(self._model, prompts, self._pad, sampling.max_tokens, routes)
        for _ in range(sampling.max_tokens):
            chosen_B, log_probs_B = _draw(batch.logits_BV, sampling, generator)
            unfinished = []
            for index, (token, log_prob) in enumerate(zip(chosen_B.tolist(), log_probs_B.tolist(), strict=True)):
                row = batch.rows[index]
                tokens[row].append(token)
                log_probs[row].append(log_prob)
                if token in sampling.stop_tokens:
                    reasons[row] = "stop"
                else:
                    unfinished.append(index)
            if not unfinished:
                break
            batch.select(unfinished)
            batch.append(chosen_B[unfinished])
        for row, request in enumerate(requests):
            yield Completion(
                request_id=request.id,
                prompt_tokens=request.prompt_tokens,
                response_tokens=tuple(tokens[row]),
                logprobs=tuple(log_probs[row]),
                finish_reason=reasons[row],
                weight_version=self._version,
                routed_experts=batch.routed(row, len(request.prompt_tokens) + len(tokens[row]) - 1) if routes else None,
            )


class _Batch:
    """Sequences that are decoded together, with their cache.

    Prompts are padded on the left, so that the next token of every sequence has the same position; rotary positions
    are relative, so the shift changes nothing, and padded positions are masked.
    """

    def __init__(self, model: GPTModel, prompts: list[tuple[int, ...]], pad: int, room: int, routes: Routes | None):
        unique = list(dict.fromkeys(prompts))
        index_of = {prompt: index for index, prompt in enumerate(unique)}
        self._model = model
        self._device = next(model.parameters()).device
        longest = max(map(len, unique))
        self._capacity = longest + room
        tokens_BL = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in unique], device=self._device)
        self._padding_BL = torch.zeros(len(unique), self._capacity, dtype=torch.bool, device=self._device)
        for index, prompt in enumerate(unique):
            self._padding_BL[index, : longest - len(prompt)] = True
        self.rows = list(range(len(unique)))
        self.logits_BV = torch.empty(0)
        self.experts: list[list[np.ndarray]] = [[] for _ in unique]
        """Of each sequence the experts [T, N, K] of its input tokens, by forward pass."""
        self._routes = routes
        self._context = StaticInferenceContext(len(unique), self._capacity)
        self._forward(tokens_BL)
        # Equal prompts were prefilled once; from here on each request has a sequence of its own.
        self.select([index_of[prompt] for prompt in prompts])
        self.rows = list(range(len(prompts)))
        self.experts = [[*self.experts[index_of[prompt]]] for prompt in prompts]

    def select(self, indices: list[int]) -> None:
        """Continue with these sequences only."""
        if indices == list(range(len(self.rows))):
            return
        index = torch.tensor(indices, device=self._device)
        self.rows = [self.rows[position] for position in indices]
        self.logits_BV = self.logits_BV[index]
        self._padding_BL = self._padding_BL[index]
        cache = self._context.key_value_memory_dict
        for layer, (key, value) in cache.items():
            cache[layer] = (key[:, index], value[:, index])
        self._context.max_batch_size = len(indices)

    def routed(self, row: int, inputs: int) -> RoutedExperts:
        """The experts of a request's input tokens; the last token of a response is no input of it."""
        return RoutedExperts.of(np.concatenate(self.experts[row])[:inputs])

    def append(self, tokens_B: Tensor) -> None:
        """Append one token to every sequence."""
        self._context.enable_decode_mode()
        self._forward(tokens_B[:, None])

    def _forward(self, tokens_BL: Tensor) -> None:
        start = self._context.sequence_len_offset
        end = start + tokens_BL.shape[1]
        positions_BL = torch.arange(start, end, device=self._device).expand(len(tokens_BL), -1)
        visible_LL = torch.arange(end, device=self._device)[None] <= positions_BL[0, :, None]
        masked_BLL = ~visible_LL[None] | self._padding_BL[:, None, :end]
        # A padded position attends to nothing; let it attend to itself, so that no row of the softmax is empty.
        masked_BLL &= torch.arange(end, device=self._device)[None] != positions_BL[0, :, None]
        logits_BLV = self._model(
            tokens_BL, positions_BL, masked_BLL[:, None], inference_context=self._context, runtime_gather_output=True
        )
        self._context.sequence_len_offset = end
        self.logits_BV = logits_BLV[:, -1].float()
        if self._routes:
            experts_LBNK = torch.unflatten(self._routes(), 0, (tokens_BL.shape[1], len(tokens_BL))).cpu().numpy()
            real_BL = (~self._padding_BL[:, start:end]).cpu().numpy()
            for index, row in enumerate(self.rows):
                self.experts[row].append(experts_LBNK[real_BL[index], index])


def _draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a token per sequence.

    Returns:
        Tokens [B] and their log-probabilities [B] under the tempered distribution, before the nucleus is cut; under
        the plain distribution when the draw is greedy.
    """
    if sampling.temperature == 0:
        chosen_B = logits_BV.argmax(-1)
        return chosen_B, logits_BV.log_softmax(-1).gather(-1, chosen_B[:, None])[:, 0]
    log_probs_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    probs_BV = log_probs_BV.exp()
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    chosen_B = torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
    return chosen_B, log_probs_BV.gather(-1, chosen_B[:, None])[:, 0]
