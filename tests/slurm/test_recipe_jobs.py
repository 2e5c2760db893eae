"""A recipe as jobs that wait for one another: a stage that is stopped goes on before the next one starts, and a stage
that fails takes those behind it out of the queue.

What a stage computes is not tested here: a program that ends with the next exit code of a list takes its place.
"""

from __future__ import annotations

import pytest

from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
STAGE = """#!/bin/bash
for word in "$@"; do
    case $word in
        name=*) name=${word#name=} ;;
        pipeline.only=*) stage=${word#pipeline.only=} ;;
    esac
done
echo "$stage $SLURM_JOB_ID" >>"FOLDER/$name.ran"
read -r code <"FOLDER/$name.$stage" && sed -i 1d "FOLDER/$name.$stage"
exit "${code:-0}"
"""
STOPPED = 85


def submit(cluster, name: str, restart: str, **codes: list[int]) -> None:
    """Submit the recipe `quickstart` up to its third stage; `codes` are those of each stage's attempts, then 0."""
    program = cluster.folder / "stage"
    program.write_text(STAGE.replace("FOLDER", str(cluster.folder)))
    program.chmod(0o755)
    for stage in ("pretrain", "r1_zero", "evaluate"):
        (cluster.folder / f"{name}.{stage}").write_text("".join(f"{code}\n" for code in codes.get(stage, [])))
    cluster.submit(
        "pipeline", f"name={name}", f"restart={restart}", "until=evaluate", "platform=cpu", f"cluster.python={program}",
        "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.exclusive=false", "cluster.memory_per_node=''",
    )  # fmt: skip


@pytest.fixture(scope="module")
def states(cluster) -> dict[str, str]:
    """How the jobs of all recipes here ended; they run side by side."""
    submit(cluster, "requeued", "requeue", pretrain=[STOPPED], r1_zero=[STOPPED])
    submit(cluster, "chained", "chain", pretrain=[STOPPED], r1_zero=[STOPPED, STOPPED])
    submit(cluster, "failed", "chain", pretrain=[STOPPED], r1_zero=[2])
    submit(cluster, "broken", "requeue", r1_zero=[2])
    return cluster.wait_for_all()


def ran(cluster, name: str) -> tuple[list[str], list[str]]:
    """The stages that ran, in order, and their jobs."""
    lines = [line.split() for line in (cluster.folder / f"{name}.ran").read_text().splitlines()]
    return [stage for stage, _ in lines], [job for _, job in lines]


def test_a_stage_that_is_queued_again_goes_on_before_the_next(cluster, states):
    stages, jobs = ran(cluster, "requeued")
    assert stages == ["pretrain", "pretrain", "r1_zero", "r1_zero", "evaluate"]
    assert [states[job] for job in dict.fromkeys(jobs)] == ["COMPLETED"] * 3


def test_the_next_stage_waits_for_the_last_link_of_a_chain(cluster, states):
    stages, jobs = ran(cluster, "chained")
    assert stages == ["pretrain"] * 2 + ["r1_zero"] * 3 + ["evaluate"]
    expected = ["FAILED", "COMPLETED", "FAILED", "FAILED", "COMPLETED", "COMPLETED"]
    assert [states[job] for job in jobs] == expected and len(set(jobs)) == len(jobs)


@pytest.mark.parametrize(("name", "before"), [("failed", ["pretrain"] * 2), ("broken", ["pretrain"])])
def test_a_stage_that_fails_leaves_nothing_queued_behind_it(cluster, states, name, before):
    assert ran(cluster, name)[0] == [*before, "r1_zero"]
    folder = cluster.run_folder(name) / "jobs"
    assert "exit code 2" in (folder / f"{name}.r1_zero" / "logs" / "stopped.txt").read_text()
    assert not (folder / f"{name}.evaluate" / "logs" / "attempts.txt").exists()
    assert set(states.values()) == {"COMPLETED", "FAILED", "CANCELLED"}
