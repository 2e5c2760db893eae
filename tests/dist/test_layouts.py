"""Every layout computes what one rank computes: losses, gradients, a GRPO update; and so does every way to save memory.

In float64 they agree to the last digits, so a layout is the same function; in fp32 they agree as far as fp32 goes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_to_the_end


@dataclass(frozen=True, kw_only=True)
class Case:
    """What differs from the tiny model on one rank."""

    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    performance: dict[str, Any] = field(default_factory=dict)
    moments: str = "fp32"
    multi_token_layers: int = 1
    reinforce: bool = True
    """Whether reinforcement learning can do it too."""

    @property
    def split_sums(self) -> bool:
        """Whether the parts of one sum lie on several ranks."""
        return bool({"tensor", "context"} & self.parallel.keys())


LAYOUTS = {
    "tp2": Case(ranks=2, parallel={"tensor": 2}),
    "pp2": Case(ranks=2, parallel={"pipeline": 2}),
    "ep2": Case(ranks=2, parallel={"expert": 2}),
    "dp2": Case(ranks=2),
    "tp2-ep2": Case(ranks=4, parallel={"tensor": 2, "expert": 2}),
    "etp2": Case(ranks=2, parallel={"tensor": 2, "expert_tensor": 2}),
    "pp2-ep2": Case(ranks=4, parallel={"pipeline": 2, "expert": 2}),
    "tp2-pp2": Case(ranks=4, parallel={"tensor": 2, "pipeline": 2}),
    "dp2-tp2": Case(ranks=4, parallel={"tensor": 2}),
    "pp2-uneven": Case(ranks=2, parallel={"pipeline": 2, "pipeline_layers": [3, 1]}),
    "pp2-vpp2": Case(ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}, reinforce=False),
    "cp2-recomputed": Case(
        ranks=2,
        parallel={"context": 2},
        performance={"recompute": ["layernorm", "mla_up_proj", "moe_act"]},
        reinforce=False,
    ),
    "cp2-tp2": Case(ranks=4, parallel={"context": 2, "tensor": 2}, reinforce=False),
    "tp2-recomputed": Case(
        ranks=2, parallel={"tensor": 2}, performance={"recompute": ["core_attn", "mlp", "shared_experts"]}
    ),
    "ep2-gathered": Case(
        ranks=2,
        parallel={"expert": 2},
        performance={"recompute": ["moe"], "dispatcher": "allgather"},
        reinforce=False,
    ),
    "dp2-overlapped": Case(
        ranks=2, performance={"overlap_gradient_reduction": True, "overlap_parameter_gather": True}
    ),
    "tp2-bf16-moments": Case(ranks=2, parallel={"tensor": 2}, moments="bf16"),
    "pp2-without-mtp": Case(ranks=2, parallel={"pipeline": 2}, multi_token_layers=0),
}
SHORT = ("tp2", "pp2", "ep2", "dp2", "tp2-ep2", "pp2-vpp2", "cp2-recomputed")
KINDS = ("pretrain", "packed", "apart", "grpo")
"""Plain sequences, packed documents that see those before them, packed documents apart, reinforcement learning."""
EXACT = 1e-12
TOLERANCE = 1e-6
SPLIT_SUM_TOLERANCE = 5e-6
"""In fp32 the parts of a sum that lie on several ranks are added in another order: 2.4e-6 was seen, and one rank's own
gradients are 2.3e-6 away from float64's."""


@dataclass(frozen=True)
class Numbers:
    """What one kind of training gave."""

    row: dict[str, Any]
    gradients: dict[str, torch.Tensor]


def numbers_of(case: Case, folder: Path) -> dict[str, Numbers]:
    """By kind and precision, as in `grpo-fp64`."""
    (folder / "job.json").write_text(json.dumps(asdict(case)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    run_to_the_end([*launcher, str(Path(__file__).with_name("ranks_layouts.py")), str(folder)], seconds=110)
    return {
        path.stem: Numbers(json.loads(path.read_text()), torch.load(path.with_suffix(".pt"), weights_only=True))
        for path in folder.glob("*-fp*.json")
    }


@pytest.fixture(scope="module")
def one_rank_alike(tmp_path_factory) -> Callable[[Case], dict[str, Numbers]]:
    """What one rank computes with a case's moments and multi-token layers; each such pair is started once."""
    seen: dict[tuple, dict[str, Numbers]] = {}

    def numbers(case: Case) -> dict[str, Numbers]:
        key = case.moments, case.multi_token_layers
        if key not in seen:
            alike = Case(moments=case.moments, multi_token_layers=case.multi_token_layers)
            seen[key] = numbers_of(alike, tmp_path_factory.mktemp("one"))
        return seen[key]

    return numbers


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    return max(
        (float((found[n].double() - expected[n].double()).norm() / (expected[n].norm() + 1e-30)), n) for n in expected
    )


@pytest.mark.dist
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_layout_computes_what_one_rank_does(one_rank_alike, layout, tmp_path):
    case = LAYOUTS[layout]
    here, one = numbers_of(case, tmp_path), one_rank_alike(case)
    kinds = [kind for kind in KINDS if f"{kind}-fp32" in here]
    assert len(kinds) == len(KINDS) - ("context" in case.parallel) - (not case.reinforce)
    for kind in kinds:
        for precision, allowed in (
            ("fp64", EXACT),
            ("fp32", SPLIT_SUM_TOLERANCE if case.split_sums else TOLERANCE),
        ):
            found, expected = here[f"{kind}-{precision}"], one[f"{kind}-{precision}"]
            difference, name = worst(found.gradients, expected.gradients)
            print(f"{layout} {kind} {precision}: largest relative difference of a gradient {difference:.1e} ({name})")
            assert difference < allowed
    for kind in ("packed", "apart"):
        if kind in kinds:
            found, expected = (numbers[f"{kind}-fp32"].row["losses"] for numbers in (here, one))
            assert found == pytest.approx(expected, rel=1e-6)
    for precision in ("fp64", "fp32"):
        found, expected = (numbers[f"pretrain-{precision}"].row["losses"] for numbers in (here, one))
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert found[1:] == pytest.approx(expected[1:], rel=1e-4)
    for found, expected in zip(*(numbers["pretrain-fp64"].row["routing"] for numbers in (here, one)), strict=True):
        # Whichever rank is asked knows every stage: the same visits to the same experts, layer by layer.
        assert found.pop("mtp_loss") == pytest.approx(expected["mtp_loss"], rel=1e-6)
        assert found == {layer: load_E for layer, load_E in expected.items() if layer != "mtp_loss"}
        assert [layer for layer in found if layer.startswith("mtp ")] == ["mtp 1"] * case.multi_token_layers
    if case.reinforce:
        assert here["grpo-fp32"].row == pytest.approx(one["grpo-fp32"].row, rel=1e-4, abs=1e-6)


@pytest.mark.dist
def test_the_update_is_the_plain_loss_over_the_whole_vocabulary(one_rank_alike):
    one = one_rank_alike(Case())
    plain = one["plain-fp64"]
    for precision, allowed in (("fp64", EXACT), ("fp32", SPLIT_SUM_TOLERANCE)):
        learnt = one[f"grpo-{precision}"]
        trained = {name: learnt.gradients[name] for name in plain.gradients}
        difference, name = worst(trained, plain.gradients)
        print(f"one rank {precision}: largest relative difference to float64's plain gradient {difference:.1e} ({name})")
        assert difference < allowed
        assert learnt.row["loss"] == pytest.approx(plain.row["loss"], rel=allowed)
