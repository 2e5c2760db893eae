"""Which checkpoints a run keeps: the newest, those of every n-th step, and the best by a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.errors import CheckpointDamaged

KEY = "best_by"
"""In a manifest's metadata: the metric's name, and its value at the checkpoint."""


@dataclass(frozen=True)
class Retention:
    """What `CheckpointStore.prune` keeps.

    The value of the metric is in each checkpoint's manifest, so that a resumed run keeps the same one: there is no
    record of the best that a kill could leave behind. Of equal values the earlier one is best. A checkpoint without a
    value of this metric, or with one that is not finite, is never best.
    """

    newest: int = 2
    """Number of verified checkpoints; at least 2, or a damaged one has none to fall back on."""
    every: int = 0
    """Steps: those that are a multiple of it are kept; 0 keeps none for their step."""
    metric: str = ""
    """Name of the metric; empty keeps none for its value."""
    higher: bool = True
    """Whether a higher value is better."""

    def __post_init__(self) -> None:
        if self.newest < 2:
            raise ValueError(
                f"newest={self.newest}: must be at least 2, or a damaged checkpoint has none to fall back on"
            )

    def metadata(self, value: float | None) -> dict[str, Any]:
        """What a checkpoint's manifest says about the metric; nothing without a finite value."""
        known = self.metric and value is not None and math.isfinite(value)
        return {KEY: {"metric": self.metric, "value": value}} if known else {}

    def beside_newest(self, checkpoints: Iterable[tuple[int, Path]]) -> set[Path]:
        """Those of a run's checkpoints, as (step, path), that are kept however old they are."""
        every = [*checkpoints]
        kept = {path for step, path in every if self.every and step % self.every == 0}
        return kept | ({best} if (best := self.best(every)) else set())

    def best(self, checkpoints: Iterable[tuple[int, Path]]) -> Path | None:
        """The best of a run's checkpoints by the metric; None where none has a value."""
        sign = 1 if self.higher else -1
        valued = [(sign * value, -step, path) for step, path in checkpoints if (value := self._value(path)) is not None]
        return max(valued)[2] if valued else None

    def _value(self, checkpoint: Path) -> float | None:
        if not self.metric:
            return None
        try:
            found = read_manifest(checkpoint).metadata.get(KEY)
        except CheckpointDamaged:
            return None
        if not isinstance(found, Mapping) or found.get("metric") != self.metric:
            return None
        return float(found["value"])

    def most_kept(self, steps: int, save_interval: int) -> int:
        """Most checkpoints that a run of `steps` steps ever keeps, without the one that is being written."""
        saved = -(-steps // save_interval)  # the last one is of the last step
        older = max(saved - self.newest, 0)
        by_step = older * save_interval // math.lcm(self.every, save_interval) if self.every else 0
        best = bool(self.metric) and by_step < older
        return min(saved, self.newest) + by_step + best
