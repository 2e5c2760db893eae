"""A recipe as jobs that wait for one another: a stage that is stopped goes on before the next one starts, and a stage
that fails takes those behind it out of the queue.

What a stage computes is not tested here: a program that ends with the next exit code of a list takes its place.
"""

from __future__ import annotations

import pytest

from megatron_r1.commands.submit import run_command
from megatron_r1.config.verbs import JobCommand
from megatron_r1.errors import PlatformError
from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
STAGE = """#!/bin/bash
for word in "$@"; do
    case $word in
        name=*) name=${word#name=} ;;
        pipeline.only=*) stage=${word#pipeline.only=} ;;
    esac
done
while [[ -f FOLDER/$name.wait ]]; do sleep 0.1; done
echo "$stage $SLURM_JOB_ID" >>"FOLDER/$name.ran"
read -r code <"FOLDER/$name.$stage" && sed -i 1d "FOLDER/$name.$stage"
exit "${code:-0}"
"""
STOPPED = 85


def command(cluster, name: str, restart: str, **codes: list[int]) -> tuple[str, ...]:
    """The recipe `quickstart` up to its third stage; `codes` are those of each stage's attempts, then 0."""
    program = cluster.folder / "stage"
    program.write_text(STAGE.replace("FOLDER", str(cluster.folder)))
    program.chmod(0o755)
    for stage in ("pretrain", "r1_zero", "evaluate"):
        (cluster.folder / f"{name}.{stage}").write_text("".join(f"{code}\n" for code in codes.get(stage, [])))
    return (
        "pipeline", f"name={name}", f"restart={restart}", "until=evaluate", "platform=cpu", f"cluster.python={program}",
        "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.exclusive=false", "cluster.memory_per_node=''",
    )  # fmt: skip


@pytest.fixture(scope="module")
def states(cluster) -> dict[str, str]:
    """How the jobs of all recipes here ended; they run side by side. One is submitted a second time meanwhile."""
    cluster.submit(*command(cluster, "requeued", "requeue", pretrain=[STOPPED], r1_zero=[STOPPED]))
    cluster.submit(*command(cluster, "failed", "chain", pretrain=[STOPPED], r1_zero=[2]))
    chained = command(cluster, "chained", "chain", pretrain=[STOPPED], r1_zero=[STOPPED, STOPPED])
    (cluster.folder / "chained.wait").touch()
    cluster.submit(*chained)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PlatformError, match="of runs/chained runs or waits"):
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.chdir(cluster.folder)
        run_command(JobCommand("pipeline", "quickstart", chained[1:]))
    (cluster.folder / "chained.wait").unlink()
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


def test_a_stage_that_fails_leaves_nothing_queued_behind_it(cluster, states):
    assert ran(cluster, "failed")[0] == ["pretrain", "pretrain", "r1_zero"]
    folder = cluster.run_folder("failed") / "jobs"
    assert "exit code 2" in (folder / "failed.r1_zero" / "logs" / "stopped.txt").read_text()
    assert not (folder / "failed.evaluate" / "logs" / "attempts.txt").exists()
    assert set(states.values()) == {"COMPLETED", "FAILED", "CANCELLED"}
