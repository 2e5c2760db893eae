"""Transformer Engine beside torch's parts in every layout: names, shapes and shards, losses, gradients, and overlap."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_layouts import worst
from tests.model import test_layout as stored
from tests.support.fork_server import run_forked_to_the_end
from tests.transformer_engine.on_cpu import needs_transformer_engine, run_with_transformer_engine
from tests.transformer_engine.ranks_layouts import LAYOUTS, OVERLAPS, STORED

SHORT = (
    "dp4-recomputed", "tp2-etp2", "tp2-ep2-shared", "pp2-vpp2", "ep2-plain", "ep2-deepseek", "pp2-vpp2-ep2-plain",
    "pp2-vpp2-ep2-deepseek", "stored",
)  # fmt: skip
"""Data, tensor, expert and interleaved pipeline parallelism, recomputation, and what overlaps communication, each in
one layout at least."""
DELAYED = ("ep2-delayed", "ep2-deepseek", "pp2-vpp2-ep2-deepseek")
"""Weight gradients come late, which torch's parts cannot do."""
PROGRAM = Path(__file__).with_name("ranks_layouts.py")
FP32 = 3e-6
BF16 = 5e-3
"""Of a gradient's norm: the embedding's two parts, for the backbone and for multi-token prediction, are summed in bf16
in another order (1.7e-3); every other gradient is equal to the last bit."""
pytestmark = [needs_transformer_engine, pytest.mark.dist, pytest.mark.timeout(240)]


class Results:
    """What the program found; the short form's cases, and all others, are computed together at the first call.

    Args:
        short: cases that the short form compares.
    """

    def __init__(
        self, run: Callable[..., None], folders: pytest.TempPathFactory, cases: Sequence[str], short: Sequence[str]
    ):
        self._run, self._folders = run, folders
        self._short, self._long = [one for one in cases if one in short], [one for one in cases if one not in short]
        self._folder = functools.cache(self._compute)

    def of(self, case: str) -> dict[str, dict[str, Any]]:
        return torch.load(self._folder(case in self._short) / f"{case}.pt", weights_only=True)

    def stored(self) -> list[dict[str, Any]]:
        """Of two ranks, as the fixture `two_ranks` has torch's parts; the other two hold the same."""
        return [{"layouts": json.loads((self._folder(True) / f"layouts-{rank}.json").read_text())} for rank in (0, 1)]

    def _compute(self, short: bool) -> Path:
        folder = self._folders.mktemp("layouts")
        self._run(PROGRAM, folder, *(self._short if short else self._long), seconds=230)
        return folder


@pytest.fixture(scope="module")
def with_te(tmp_path_factory) -> Results:
    return Results(run_with_transformer_engine, tmp_path_factory, [*LAYOUTS, *OVERLAPS, "stored"], SHORT)


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory) -> Results:
    cases = [*LAYOUTS, *(case for case in OVERLAPS if case not in DELAYED)]
    return Results(run_forked_to_the_end, tmp_path_factory, cases, [case for case in SHORT if case in LAYOUTS])


def in_both_forms(cases: Iterable[str]) -> list[Any]:
    return [pytest.param(case, marks=[] if case in SHORT else [pytest.mark.slow]) for case in cases]


def assert_alike(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for kind in found:
        assert all(gradient.isfinite().all() for gradient in found[kind]["gradients"].values())
        difference, name = worst(found[kind]["gradients"], expected[kind]["gradients"])
        print(f"{kind}: largest relative difference of a gradient {difference:.1e} ({name})")
        assert difference < tolerance, (kind, name)
        assert found[kind]["loss"] == pytest.approx(expected[kind]["loss"], rel=tolerance)


@pytest.mark.parametrize("case", in_both_forms(LAYOUTS))
def test_a_layout_gives_the_losses_and_gradients_of_torch_parts(with_te, with_torch, case):
    assert_alike(with_te.of(case), with_torch.of(case), FP32)


@pytest.mark.parametrize("case", in_both_forms(case for case in OVERLAPS if not case.endswith("plain")))
def test_overlap_of_expert_communication_changes_no_gradient(with_te, case):
    plain = case.rpartition("-")[0] + "-plain"
    assert_alike(with_te.of(case), with_te.of(plain), BF16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2", "pp2-vpp2-ep2"])
def test_torch_parts_overlap_expert_communication_too(with_torch, layout):
    assert_alike(with_torch.of(f"{layout}-overlapped"), with_torch.of(f"{layout}-plain"), BF16)


@pytest.mark.parametrize("shape", STORED)
@pytest.mark.parametrize(
    "check",
    [
        stored.test_two_tensor_parallel_ranks_share_the_stored_dimensions,
        stored.test_shards_say_where_they_belong_in_the_whole,
        stored.test_main_shards_make_up_each_tensor_exactly_once,
    ],
)
def test_the_stored_list_is_of_transformer_engine(check, shape, with_te):
    check(shape, with_te.stored())
