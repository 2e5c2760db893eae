"""Metrics of the experts' loads against arithmetic by hand, also after a resume."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.train.hooks.balance import BalanceHook, load_metrics
from megatron_r1.train.state import TrainState

LOADS = [
    {"layer 2": [30.0, 10, 10, 10], "layer 3": [10.0, 20, 10, 20], "mtp 1": [60.0, 0, 0, 0]},
    {"layer 2": [10.0, 30, 10, 10], "layer 3": [20.0, 10, 20, 10], "mtp 1": [60.0, 0, 0, 0]},
    {"layer 2": [10.0, 10, 30, 10], "layer 3": [15.0, 15, 15, 15], "mtp 1": [0.0, 60, 0, 0]},
]


def rows_of(hook: BalanceHook, steps: range) -> list[dict]:
    rows = []
    for step in steps:
        row = load_metrics({layer: torch.tensor(load) for layer, load in LOADS[step].items()})
        hook.after_step(TrainState(step=step + 1), row)
        rows.append(row)
    return rows


def test_loads_are_multiples_of_an_even_share_with_multi_token_layers_separate():
    row = load_metrics({layer: torch.tensor(load) for layer, load in LOADS[0].items()})
    assert row["moe/load"] == {
        "layer 2": [2.0, 0.6667, 0.6667, 0.6667],
        "layer 3": [0.6667, 1.3333, 0.6667, 1.3333],
        "mtp 1": [4.0, 0.0, 0.0, 0.0],
    }
    assert (row["moe/load_max"], row["moe/mtp_load_max"]) == (2.0, 4.0)
    assert load_metrics({}) == {}


def test_violations_are_those_of_the_window():
    rows = rows_of(BalanceHook(2, 2, {}), range(3))
    assert [row["moe/max_violation"] for row in rows] == pytest.approx([1.0, 1 / 3, 1 / 3], abs=1e-3)
    assert [row["moe/mtp_max_violation"] for row in rows] == pytest.approx([3.0, 3.0, 1.0], abs=1e-3)
    assert rows[2]["moe/layer_load_max"] == {"layer 2": 2.0, "layer 3": 1.0, "mtp 1": 4.0}
    assert ["moe/load" in row for row in rows] == [False, True, False]


def test_a_resumed_window_continues_as_if_it_had_not_stopped():
    whole = rows_of(BalanceHook(3, 1, {}), range(3))
    first = BalanceHook(3, 1, {})
    rows = rows_of(first, range(2))
    assert rows + rows_of(BalanceHook(3, 1, first.tensors()), range(2, 3)) == whole
    assert BalanceHook(3, 1, {}).tensors() == {}


def test_a_model_without_routers_has_no_load():
    row: dict = {}
    BalanceHook(3, 1, {}).after_step(TrainState(step=1), row)
    assert row == {}
