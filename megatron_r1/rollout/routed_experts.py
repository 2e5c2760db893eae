"""The experts that a rollout engine's routers chose, as part of a sample.

Shapes: T input tokens (prompt and response without its last token), N sparse layers of the backbone, K experts a token.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """Which layers have experts in an engine's reply, which counts every layer, dense ones too."""

    layers: int
    """Of the backbone."""
    first_dense: int
    """How many of them, from the first, have no router."""
    top_k: int


def narrowed(experts_TNK: np.ndarray) -> np.ndarray:
    """The same numbers as unsigned integers, in as few bytes as they fit."""
    return experts_TNK.astype(np.uint8 if experts_TNK.max(initial=0) < 256 else np.uint16)


def parse_routed_experts(text: str, tokens: int, layout: RoutedLayers) -> np.ndarray:
    """The experts [T, N, K] in `meta_info.routed_experts` of SGLang: base64 of int32 [T, layers, K].

    Raises:
        ValueError: it is not that, or names no expert where there must be one.
    """
    raw = base64.b64decode(text, validate=True)
    shape = (tokens, layout.layers, layout.top_k)
    if len(raw) != 4 * tokens * layout.layers * layout.top_k:
        raise ValueError(f"routed experts of {len(raw)} bytes: must be int32 {list(shape)}")
    experts_TNK = np.frombuffer(raw, "<i4").reshape(shape)[:, layout.first_dense :]
    if experts_TNK.min(initial=0) < 0:
        raise ValueError("routed experts: a token was sent to no expert")
    return narrowed(experts_TNK)
