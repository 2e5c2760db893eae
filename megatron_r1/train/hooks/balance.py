"""How evenly the experts are loaded, measured over a window of steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

SAVED = "router_load_window"


class BalanceHook(Hook):
    """Adds to each row the imbalance over a window of steps, and each layer's busiest expert.

    The violation is (largest load - mean load) / mean load, MaxVio of Wang et al. 2024, "Auxiliary-Loss-Free Load
    Balancing Strategy for Mixture-of-Experts": 0 where all loads are even. Over a window, differences from step to step
    cancel out, and the router's preference remains. The whole table of loads is recorded only every `interval` steps:
    for a large model it has tens of thousands of numbers.
    """

    def __init__(self, window: int, interval: int, saved: Mapping[str, Tensor]):
        """
        Args:
            window: number of steps whose loads are summed up.
            interval: steps between rows with the whole table, `moe/load`.
            saved: result of `tensors` in the checkpoint of a run that resumes.
        """
        self._interval = interval
        self._loads: deque[Tensor] = deque(saved.get(SAVED, ()), maxlen=window)

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if not (loads := row.get("moe/load")):
            return
        self._loads.append(torch.tensor([*loads.values()]))
        mean_LE = torch.stack([*self._loads]).mean(0)
        violations = dict(zip(loads, (mean_LE.amax(1) / mean_LE.mean(1) - 1).tolist(), strict=True))
        row |= worst_of_each_kind("max_violation", violations)
        row["moe/layer_load_max"] = {layer: max(load) for layer, load in loads.items()}
        if state.step % self._interval:
            del row["moe/load"]

    def tensors(self) -> dict[str, Tensor]:
        """The window [W, L, E], for a checkpoint; nothing before the first step."""
        return {SAVED: torch.stack([*self._loads])} if self._loads else {}


def relative_loads(expert_load: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Tokens per expert of each layer as multiples of an even share."""
    return {
        layer: [round(load, 4) for load in (load_E / load_E.mean()).tolist()] for layer, load_E in expert_load.items()
    }


def load_metrics(expert_load: Mapping[str, Tensor]) -> dict[str, Any]:
    """Load metrics of a step: the busiest expert of the backbone, that of multi-token layers, the table."""
    if not expert_load:
        return {}
    loads = relative_loads(expert_load)
    busiest = {layer: max(load) for layer, load in loads.items()}
    return {**worst_of_each_kind("load_max", busiest), "moe/load": loads}


def worst_of_each_kind(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """The largest value over the backbone's layers, and separately, as `moe/mtp_NAME`, over multi-token layers."""
    kinds: dict[str, list[float]] = {}
    for layer, value in values.items():
        kinds.setdefault(f"moe/mtp_{name}" if layer.startswith("mtp ") else f"moe/{name}", []).append(value)
    return {kind: max(found) for kind, found in kinds.items()}
