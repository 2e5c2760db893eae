"""Ranks that are stopped, killed, sleep, raise, refuse, have NaN, or wait for a server that hangs: the run ends in a
bounded time and names the rank, its host and phase; checkpoints hold what an undisturbed run's hold.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.errors import ExitCode
from tests.support.hangs import BOUND_S, KINDS, Fault
from tests.support.launching import run_to_the_end

STALLED = int(ExitCode.STALLED)
ENDED = {
    "raising": ExitCode.REQUEUE,
    "killed": ExitCode.REQUEUE,
    "refusing": ExitCode.NO_ROLLOUT_CAPACITY,
}
"""Exit code of the other ranks where it is not that of a deadline, by kind of the fault."""
DEADLINE_S = 12.0
"""A busy machine may pause a sound rank for some seconds."""


def campaign(folder: Path, kinds: str, number: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.hangs", str(folder)]
    run_to_the_end(
        [*program, "--kinds", kinds, "--number", str(number), "--seed", str(seed), "--deadline", str(DEADLINE_S)],
        seconds,
    )
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def check(case: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """What holds of every case."""
    fault = case["fault"]
    others = [str(rank) for rank in range(fault["ranks"]) if rank != fault["rank"]]
    own, codes = str(fault["rank"]), case["codes"]
    name = f"rank {own} on node{own}"
    place = f"in phase {fault['phase']} of step {fault['step']}"
    assert case["seconds"] < DEADLINE_S + BOUND_S, case
    if fault["kind"] == "nan":
        assert set(codes.values()) == {0}, case["logs"]
        assert f"{place}: gradients of {name} are not finite; the update is skipped" in case["logs"]["0"]
        assert [row["train/skipped_updates"] for row in case["rows"]] == [
            int(row["step"] == fault["step"]) for row in case["rows"]
        ]
        before, after = (case["checkpoints"][str(fault["step"] - number)] for number in (1, 0))
        assert weights(before) == weights(after) != weights(case["checkpoints"][str(fault["step"] + 1)])
        return
    ended = ENDED.get(fault["kind"], STALLED)
    assert {rank: codes[rank] for rank in others} == dict.fromkeys(others, ended), case["logs"]
    for rank in others:
        # After it torch itself may complain that the store is gone.
        last = [line for line in case["logs"][rank].splitlines() if line.startswith("megatron-r1: ")][-1]
        assert name in last and place in last, (fault, last)
    if fault["kind"] == "raising":
        assert codes[own] == ExitCode.BUG
        assert f"{name} failed {place}: ValueError: the fault of this test" in case["logs"][own]
    elif fault["kind"] == "refusing":
        assert codes[own] == ended and "megatron-r1: the refusal of this test\n" in case["logs"][own]
        assert all("the refusal of this test" in case["logs"][rank] for rank in others)
    elif fault["kind"] == "killed":
        assert codes[own] == -9
    else:
        assert codes[own] == (-9 if fault["kind"] == "stopped" else STALLED)
        assert case["stacks"].keys() >= {*others}
    if fault["kind"] == "server":
        assert "waiting_for_a_server" in case["stacks"][own]
    if fault["kind"] == "asleep":
        assert "sleeping_for_ever" in case["stacks"][own]
    saved = case["checkpoints"]
    assert max(map(int, saved)) in (fault["step"] - 1, fault["step"] if fault["phase"] == "save" else -1)
    for step, files in saved.items():
        assert tensors(files) == tensors(undisturbed["checkpoints"][step]), f"step {step} of {fault}"


def tensors(files: dict[str, str]) -> dict[str, str]:
    """Files of a checkpoint that hold tensors, with their hashes: weights, moments, random states."""
    found = {name: record for name, record in files.items() if re.search(r"\.safetensors", name)}
    assert found
    return found


def weights(files: dict[str, str]) -> dict[str, str]:
    return {name: record for name, record in tensors(files).items() if name.startswith("model-")}


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_one_of_each(tmp_path):
    """Two or three real ranks; a stopped one is waited for by a heartbeat, one that sleeps by its deadline."""
    found = campaign(tmp_path, "asleep,raising,refusing,killed,nan", 1, seconds=380, seed=3)
    assert len(found["outcomes"]) == 5
    for case in found["outcomes"]:
        check(case, found["undisturbed"][Fault(**case["fault"]).job])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_of_each(tmp_path, kind):
    found = campaign(tmp_path, kind, 20, seconds=7000, seed=1)
    assert len(found["outcomes"]) == 20
    seconds = sorted(case["seconds"] for case in found["outcomes"])
    for case in found["outcomes"]:
        check(case, found["undisturbed"][Fault(**case["fault"]).job])
    print(f"{kind}: 20 of 20, from the fault to the end {seconds[10]:.1f} s (median), {seconds[-1]:.1f} s (largest)")
