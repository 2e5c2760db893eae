"""The experts that a rollout engine's routers chose, as part of a sample.

Shapes: T input tokens (prompt and response without its last token), N sparse layers of the backbone, K experts a token.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Self

import numpy as np

_NARROW, _WIDE = "<u1", "<u2"


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """Which layers have experts in an engine's reply, which counts every layer, dense ones too."""

    layers: int
    """Of the backbone."""
    first_dense: int
    """How many of them, from the first, have no router."""
    top_k: int


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Experts [T, N, K] by their numbers, in as few bytes as they fit."""

    shape: tuple[int, int, int]
    data: str
    """Base64 of little-endian unsigned numbers."""

    @classmethod
    def of(cls, experts_TNK: np.ndarray) -> Self:
        tokens, layers, top_k = experts_TNK.shape
        kind = _NARROW if experts_TNK.max(initial=0) < 256 else _WIDE
        return cls((tokens, layers, top_k), base64.b64encode(experts_TNK.astype(kind).tobytes()).decode())

    @classmethod
    def from_sglang(cls, text: str, tokens: int, layout: RoutedLayers) -> Self:
        """Read `meta_info.routed_experts` of SGLang: base64 of int32 [T, layers, K].

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
        return cls.of(experts_TNK)

    def array(self) -> np.ndarray:
        """The experts [T, N, K], int64."""
        raw = base64.b64decode(self.data)
        tokens, layers, top_k = self.shape
        kind = _NARROW if len(raw) == tokens * layers * top_k else _WIDE
        return np.frombuffer(raw, kind).reshape(self.shape).astype(np.int64)
