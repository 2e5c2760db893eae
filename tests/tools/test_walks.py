"""The walks of tools/walks.py are the code, and no longer than they were."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "walks.py"


@pytest.fixture(scope="module")
def walks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walks", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["walks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_prompt_is_followed_from_file_to_gradient(walks: ModuleType) -> None:
    found = walks.walked(walks.PROMPT)
    print(found)
    assert found.files <= 40 and found.functions <= 104 and found.returns <= 6


def test_a_weight_is_followed_from_optimizer_to_server(walks: ModuleType) -> None:
    found = walks.walked(walks.WEIGHT)
    print(found)
    assert found.files <= 17 and found.functions <= 42 and found.returns <= 2


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (["train.loop:train", "train.loop:no_such_function"], "no_such_function"),
        (["train.loop:train", "rl.mismatch:alarms"], "alarms"),
    ],
)
def test_a_walk_that_is_not_the_code_fails(walks: ModuleType, places: list[str], named: str) -> None:
    with pytest.raises(LookupError, match=named):
        walks.walked(places)
