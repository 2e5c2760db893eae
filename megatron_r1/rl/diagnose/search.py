"""From a trial to a diagnosis: the first token that differs, and the cause that explains the difference best.

Shapes: T input tokens of one response, N sparse layers, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.rl.diagnose import causes
from megatron_r1.rl.diagnose.causes import Cause
from megatron_r1.rl.diagnose.trial import Gap, Trial
from megatron_r1.rl.policy.batch import response_part
from megatron_r1.rollout.sample import response_of

EXPLAINS, EXPLAINS_IN_PART = 0.9, 0.5
"""Shares of the mean difference that a cause must remove to explain it, wholly or in part."""
AS_GOOD = 0.01
"""Causes whose explained shares differ by less than this count as equally good."""
MOST_PAIRS_OF = 16
"""Experts of a layer of which all pairs are tried."""


@dataclass(frozen=True)
class TriedCause:
    """A cause and how much it explains."""

    cause: Cause
    gap: Gap
    """The difference that remains under this cause."""
    explained: float
    """Share of the mean difference that it removes; below 0 where it adds to it."""


@dataclass(frozen=True)
class Association:
    """How much more the log-probabilities of an expert's tokens differ than those of others."""

    layer: int
    """Counted from 1."""
    expert: int
    ratio: float


@dataclass(frozen=True)
class Diagnosis:
    """The result."""

    gap: Gap
    floor: float
    """Mean difference up to which engine and trainer count as equal."""
    tried: list[TriedCause]
    """Best first."""
    first_tokens: list[int | None]
    """Of each response the first token that differs by more than ten floors; None where none does."""
    routing_mismatch_by_layer: dict[int, float]
    """Share of the engine's recorded expert choices that differ from the trainer's, by layer from 1."""
    associations: list[Association]
    """The experts whose tokens differ most."""

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.gap.mean <= self.floor:
            return f"engine and trainer agree: mean difference {self.gap.mean:.2g} nats"
        best = self.tried[0] if self.tried else None
        if best is None or best.explained < EXPLAINS_IN_PART:
            return "none of the known causes explains the difference"
        word = "explains" if best.explained >= EXPLAINS else "explains in part"
        cause = f"{best.cause.kind}: that the engine {best.cause.what}"
        return f"{cause} {word} the difference ({best.explained:.1%} of {self.gap.mean:.3g} nats)"

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        return {
            "verdict": self.verdict,
            "gap": self.gap._asdict(),
            "tried": [
                {"kind": one.cause.kind, "what": one.cause.what, "explained": one.explained, **one.gap._asdict()}
                for one in self.tried
            ],
            "first_tokens": self.first_tokens,
            "routing_mismatch_by_layer": self.routing_mismatch_by_layer,
            "associations": [vars(one) for one in self.associations],
        }


def diagnose(
    trial: Trial,
    others: Mapping[str, Mapping[str, Tensor]],
    floor: float,
    progress: Callable[[str], None] = lambda what: None,
) -> Diagnosis:
    """Try every cause.

    Args:
        others: weights that the engine may have used instead, by name.
        floor: mean difference, in nats, up to which engine and trainer count as equal.
        progress: called with the name of each cause before it is tried.
    """
    own = trial.log_probs()
    gap, differences = trial.gap(own), [(a - b).abs() for a, b in zip(trial.saved, own, strict=True)]
    firsts = [next(iter((one > 10 * floor).nonzero().flatten().tolist()), None) for one in differences]
    if gap.mean <= floor:
        return Diagnosis(gap, floor, [], firsts, {}, [])
    experts = trial.experts() if trial.replay else []
    first_sparse = min((layer for layer, _ in causes.expert_weights(trial.model)), default=0)
    ranked = associations(trial, experts, differences, first_sparse)
    plain: Iterable[Cause] = chain(
        causes.temperature(trial), causes.template(trial), causes.stale_weights(trial, others), causes.routing(trial),
        causes.precision(trial), causes.bias(trial),
    )  # fmt: skip
    tried = []
    for cause in plain:
        progress(cause.what)
        tried.append(_found(trial, cause, gap))
    if trial.replay and max((one.explained for one in tried), default=0.0) < EXPLAINS:
        progress("pairs of experts")
        tried += _pairs(trial, ranked, gap)
    order = sorted(range(len(tried)), key=lambda index: -tried[index].explained)
    leader = next((p for p in sorted(order) if tried[p].explained > tried[order[0]].explained - AS_GOOD), None)
    best = [] if leader is None else [tried[leader]]
    rest = [tried[index] for index in order if index != leader]
    return Diagnosis(gap, floor, best + rest, firsts, _routing_mismatch(trial, experts, first_sparse), ranked[:5])


def associations(
    trial: Trial, experts: Sequence[Tensor], differences: Sequence[Tensor], first_sparse: int
) -> list[Association]:
    """Every expert's, the largest first: the mean difference of its tokens over that of other tokens."""
    if not experts:
        return []
    pairs = zip(experts, trial.samples, strict=True)
    routed_TNK = torch.cat([response_part(sample, experts_TNK) for experts_TNK, sample in pairs])
    difference_T = torch.cat(list(differences))
    found = []
    for layer in range(routed_TNK.shape[1]):
        for expert in range(int(routed_TNK.max()) + 1):
            its_T = (routed_TNK[:, layer] == expert).any(-1)
            if its_T.any() and not its_T.all():
                ratio = difference_T[its_T].mean() / difference_T[~its_T].mean().clamp(min=1e-12)
                found.append(Association(first_sparse + layer + 1, expert, float(ratio)))
    return sorted(found, key=lambda one: -one.ratio)


def _pairs(trial: Trial, ranked: Sequence[Association], gap: Gap) -> list[TriedCause]:
    """The best pair of exchanged experts, of those in each layer whose tokens differ most."""
    suspects: dict[int, list[int]] = {}
    for one in ranked:
        named = suspects.setdefault(one.layer - 1, [])
        if len(named) < MOST_PAIRS_OF:
            named.append(one.expert)
    few = trial.few(causes.FEW)
    before = few.gap(few.log_probs())
    tried = [(_found(few, cause, before).explained, cause) for cause in causes.experts(few, suspects)]
    if not tried:
        return []
    _, best = max(tried, key=lambda pair: pair[0])
    return [_found(trial, best, gap)]


def _found(trial: Trial, cause: Cause, before: Gap) -> TriedCause:
    gap = trial.gap(cause.log_probs(trial))
    return TriedCause(cause, gap, 1.0 - gap.mean / before.mean)


def _routing_mismatch(trial: Trial, experts: Sequence[Tensor], first_sparse: int) -> dict[int, float]:
    recorded = [
        (torch.from_numpy(its_TNK.astype(np.int64)), own_TNK)
        for sample, own_TNK in zip(trial.samples, experts, strict=False)
        if (its_TNK := response_of(sample).routed_experts) is not None
    ]
    if not recorded:
        return {}
    engine_TNK, own_TNK = (torch.cat(list(side)) for side in zip(*recorded, strict=True))
    same_TNK = (engine_TNK[..., :, None] == own_TNK[..., None, :]).any(-1)
    shares = 1.0 - same_TNK.double().mean((0, 2))
    return {first_sparse + layer + 1: float(share) for layer, share in enumerate(shares)}
