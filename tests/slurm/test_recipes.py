"""Recipes on a real SLURM: their jobs are accepted, and wait for one another.

A stage that is stopped goes on before the next one starts, and a stage that fails takes those behind it out of the
queue. What a stage computes is not tested here: a program that ends with the next exit code of a list takes its place.
Nodes of eight GPUs are on paper: SLURM plans jobs for them.
"""

from __future__ import annotations

import pytest

from megatron_r1.check.finding import State
from megatron_r1.check.run import check_command
from megatron_r1.check.slurm import partitions
from megatron_r1.cluster.job import job_script
from megatron_r1.cluster.request import requested_job
from megatron_r1.commands.submit import jobs_of, run_command
from megatron_r1.config.recipes import recipes
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.errors import PlatformError
from tests.config.test_verb_keys import VERB_OF
from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
V3 = ("model=v3_671b", "parallel=v3_671b", "nodes=128", "cluster=pyxis")
GPUS = dict.fromkeys(("gsm8k_qwen", "r1_16b", "r1_671b"), 8)
CHANGED = {
    **dict.fromkeys(("quickstart", "r1_tiny", "smollm"), ("pipeline.overrides=['model.dtype=bf16']",)),
    "r1_671b": ("from=r1_zero_32k", "until=math_drafts"),
}
"""Recipe of several stages -> its machine, and what makes its jobs ones that this machine runs: 16-bit numbers, and of
64 jobs three whose nodes there are."""
FIRST_STAGES = dict.fromkeys(("r1_tiny", "r1_16b"), ("until=r1_zero",))
"""Part of a long recipe that is enough but for the slow form: its stages take a seventh of a second each to compose."""
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


@pytest.fixture(scope="module", autouse=True)
def recipe_jobs(cluster) -> None:
    """The jobs of three recipes, which run beside the tests of this file; one is submitted a second time meanwhile."""
    cluster.submit(*command(cluster, "requeued", "requeue", pretrain=[STOPPED], r1_zero=[STOPPED]))
    cluster.submit(*command(cluster, "failed", "chain", pretrain=[STOPPED], r1_zero=[2]))
    chained = command(cluster, "chained", "chain", pretrain=[STOPPED], r1_zero=[STOPPED, STOPPED])
    (cluster.folder / "chained.wait").touch()
    cluster.submit(*chained)
    with cluster.entered(), pytest.raises(PlatformError, match="of runs/chained runs or waits"):
        run_command(JobCommand("pipeline", "quickstart", chained[1:]))
    (cluster.folder / "chained.wait").unlink()


@pytest.fixture(scope="module")
def states(cluster) -> dict[str, str]:
    """How all jobs ended."""
    return cluster.wait_for_all()


def planned(cluster, recipe: str, *overrides: str) -> list[str]:
    """What `sbatch --test-only` says of each job of a recipe."""
    verb = VERB_OF[recipe]
    source = ["init.from=base"] if VERBS[verb].needs_model else []
    source += ["data.prompts.path=prompts.jsonl", "rollout.max_response_tokens=64"] if verb == "grpo" else []
    lines = (
        f"cluster.gpus_per_node={GPUS.get(recipe, 1)}",
        *CHANGED.get(recipe, ()),
        *source,
        "cluster.partition=gpu",
        f"name={recipe}",
        *overrides,
    )
    config = requested_job(JobCommand(verb, recipe, lines), lambda _: None)
    said = []
    for job, output in jobs_of(config):
        path = cluster.folder / f"{job.name}.sh"
        path.write_text(job_script(job, output))
        said.append(cluster.run("sbatch", "--test-only", str(path)).stderr)
    return said


@pytest.mark.parametrize(
    "recipe",
    [one for one in recipes() if not (VERBS[VERB_OF[one]].of_command or VERB_OF[one] == "doctor" or one == "r1_671b")],
)
def test_slurm_accepts_the_jobs_of_a_recipe(cluster, recipe):
    profile = f"cluster={'apptainer' if len(recipe) % 2 else 'pyxis'}"
    said = planned(cluster, recipe, profile, *FIRST_STAGES.get(recipe, ()))
    assert said and [one for one in said if "to start at" not in one] == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FIRST_STAGES)
def test_slurm_accepts_all_jobs_of_a_long_recipe(cluster, recipe):
    said = planned(cluster, recipe, "cluster=pyxis")
    assert len(said) > 20 and [one for one in said if "to start at" not in one] == []


@pytest.mark.parametrize("recipe", ["pretrain_v3", "sft_v3"])
def test_slurm_accepts_a_job_of_1024_gpus(cluster, recipe):
    (said,) = planned(cluster, recipe, *V3, "cluster.gpus_per_node=8")
    assert "16384 processors" in said and "gpu[001-128]" in said


def test_slurm_accepts_the_stages_of_a_recipe_on_the_nodes_of_each(cluster):
    said = planned(cluster, "r1_671b")
    assert [one.partition("processors on nodes ")[2].split()[0] for one in said] == ["gpu[001-128]"] * 2 + ["gpu001"]


def test_check_reads_the_partitions_of_slurm(cluster):
    """What SLURM itself prints, of nodes that are off too; `tests/check` has partitions without a SLURM."""
    command = ("check.partition=short", "check.time_limit_minutes=90", "check.gpu=H100", "check.ranks=24")
    with cluster.entered():
        found = {one.name: one[1:] for one in partitions()}
        findings = check_command(JobCommand("pretrain", "pretrain", command)).findings[25]
    assert found == {"all": (None, 2, 0), "gpu": (None, 160, 0), "short": (60.0, 2, 0)}
    assert [one.change for one in findings if one.state is State.REFUSED] == [
        "take at most 60, and let the job be continued", "take fewer ranks, or another partition",
    ]  # fmt: skip


def test_slurm_refuses_what_it_has_no_nodes_for(cluster):
    (said,) = planned(cluster, "pretrain", "nodes=161", "train.global_batch_size=2576")
    assert "not available" in said


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
