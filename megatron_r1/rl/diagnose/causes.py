"""Known causes of a mismatch between engine and trainer, each with the log-probabilities that would result from it.

Causes are in order of preference, for the case that two explain a batch equally well. Each is simulated in the trainer:
if the engine may lack a bias, the trainer computes without it. The cause whose log-probabilities match the saved ones
is the right one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations

import torch
from torch import Tensor

from megatron_r1.model.build import native_tensors
from megatron_r1.model.chunks import Model
from megatron_r1.model.megatron_overrides import routers_in_bf16
from megatron_r1.rl.diagnose.trial import Trial, replaced, with_prompt
from megatron_r1.rollout.sample import Sample, response_of

TEMPERATURES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
REFINEMENTS, GOLDEN = 18, (math.sqrt(5) - 1) / 2
FEW = 16
"""Responses on which causes with many variants are tried first."""
NEAR_AN_END = 4
"""Tokens at each end of a prompt that are tried as missing."""
_EXPERT = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.(.+)\.weight(\d+)")
_BIAS = re.compile(r"decoder\.layers\.(\d+)\.(.*bias)")

LogProbs = list[Tensor]


@dataclass(frozen=True)
class Cause:
    """One possible cause."""

    kind: str
    """temperature, template, stale weights, routing, precision, bias or experts."""
    what: str
    """Short description of what the engine does differently."""
    log_probs: Callable[[Trial], LogProbs]
    """Those that the trainer computes under this cause."""


def temperature(trial: Trial) -> Iterator[Cause]:
    """The temperature under which the saved log-probabilities fit best."""

    few = trial.few(FEW)

    @cache
    def gap(value: float) -> float:
        return few.gap(few.log_probs(temperature=value)).mean

    grid = sorted({*TEMPERATURES, trial.temperature})
    best = min(range(len(grid)), key=lambda index: gap(grid[index]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = golden_section(gap, low, high)
    if abs(found - trial.temperature) > 1e-3:
        yield Cause("temperature", f"sampled at {found:.3g}", lambda trial: trial.log_probs(temperature=found))


def golden_section(value_at: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a function that first falls and then rises (Kiefer, 1953)."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    for _ in range(REFINEMENTS):
        if value_at(left) < value_at(right):
            left, right, high = right - GOLDEN * (right - low), left, right
        else:
            left, right, low = right, left + GOLDEN * (high - left), left
    return (low + high) / 2


def template(trial: Trial) -> Iterator[Cause]:
    """A token of the prompt that the engine missed, or read twice."""

    def after(what: str, prompt: Callable[[list[int]], list[int]]) -> Cause:
        def change(sample: Sample) -> Sample:
            return with_prompt(sample, prompt(response_of(sample).prompt_tokens.tolist()))

        return Cause("template", what, lambda trial: trial.log_probs(change=change))

    shortest = min(sample.prompt_length for sample in trial.samples)
    for index in range(min(NEAR_AN_END, shortest - 1)):
        yield after(f"read no prompt token {index}", partial(_without, index=index))
        yield after(f"read no prompt token {index} from the end", partial(_without, index=-1 - index))
    yield after("read the first prompt token twice", lambda p: p[:1] + p)
    yield after("read the last prompt token twice", lambda p: p + p[-1:])


def _without(tokens: list[int], index: int) -> list[int]:
    index %= len(tokens)
    return tokens[:index] + tokens[index + 1 :]


def stale_weights(trial: Trial, others: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Cause]:
    """Weights of another step.

    Args:
        others: whole tensors by megatron-core name, by the name of the checkpoint.
    """

    def log_probs(weights: Mapping[str, Tensor]) -> Callable[[Trial], LogProbs]:
        def compute(trial: Trial) -> LogProbs:
            own = dict(native_tensors(trial.model))
            with replaced({own[name]: weights[name] for name in own}):
                return trial.log_probs()

        return compute

    for name, weights in others.items():
        yield Cause("stale weights", f"sampled with the weights of {name}", log_probs(weights))


def routing(trial: Trial) -> Iterator[Cause]:
    """The engine's choice of experts, where it was recorded."""
    if trial.replay and any(response_of(sample).routed_experts is not None for sample in trial.samples):
        yield Cause("routing", "chose other experts", lambda trial: trial.log_probs(replayed=True))


def precision(trial: Trial) -> Iterator[Cause]:
    """bf16 where the trainer computes in a wider format."""
    if trial.replay:
        yield Cause("precision", "routers computed in bf16", _with_bf16_routers)
    weights = {tensor: tensor.bfloat16().to(tensor.dtype) for _, tensor in native_tensors(trial.model)}
    if any(not torch.equal(tensor, rounded) for tensor, rounded in weights.items()):
        yield Cause("precision", "weights rounded to bf16", partial(_with, values=weights))


def bias(trial: Trial) -> Iterator[Cause]:
    """A bias that the engine lacks: in every layer, or in one."""
    kinds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in native_tensors(trial.model):
        if (match := _BIAS.fullmatch(name)) and tensor.any():
            kinds.setdefault(match[2], {})[int(match[1])] = tensor
    for kind, layers in kinds.items():
        zero = {tensor: torch.zeros_like(tensor) for tensor in layers.values()}
        yield Cause("bias", f"had no {kind}", partial(_with, values=zero))
        for layer, tensor in layers.items() if len(layers) > 1 else ():
            one = {tensor: zero[tensor]}
            yield Cause("bias", f"had no {kind} in layer {layer + 1}", partial(_with, values=one))


def experts(trial: Trial, suspects: Mapping[int, list[int]]) -> Iterator[Cause]:
    """Two experts of a layer exchanged.

    Args:
        suspects: experts of each layer, counted from 0, the most suspect first; all their pairs are tried.
    """
    weights = expert_weights(trial.model)
    for layer, named in suspects.items():
        for pair in combinations(named, 2):
            one, other = (weights[layer, expert] for expert in pair)
            swapped = {one[part]: other[part].clone() for part in one} | {other[p]: one[p].clone() for p in one}
            low, high = sorted(pair)
            what = f"had experts {low} and {high} of layer {layer + 1} in each other's place"
            yield Cause("experts", what, partial(_with, values=swapped))


def expert_weights(model: Model) -> dict[tuple[int, int], dict[str, Tensor]]:
    """By layer, counted from 0, and expert: its matrices by name."""
    weights: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in native_tensors(model):
        if match := _EXPERT.fullmatch(name):
            weights.setdefault((int(match[1]), int(match[3])), {})[match[2]] = tensor
    return weights


def _with(trial: Trial, values: Mapping[Tensor, Tensor]) -> LogProbs:
    with replaced(values):
        return trial.log_probs()


def _with_bf16_routers(trial: Trial) -> LogProbs:
    with routers_in_bf16(trial.model):
        return trial.log_probs()
