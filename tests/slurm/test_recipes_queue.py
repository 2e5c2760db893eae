"""Jobs of all recipes are accepted by a real SLURM with nodes of eight GPUs, and refused where it lacks the nodes."""

from __future__ import annotations

import pytest

from megatron_r1.check.finding import State
from megatron_r1.check.run import check_command
from megatron_r1.check.slurm import partitions
from megatron_r1.cluster.job import job_script
from megatron_r1.cluster.request import requested_job
from megatron_r1.commands.submit import jobs_of
from megatron_r1.config.recipes import recipes
from megatron_r1.config.verbs import VERBS, JobCommand
from tests.config.test_verb_keys import VERB_OF
from tests.support.slurm_cluster import absent

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent() or "none")
V3 = ("model=v3_671b", "parallel=v3_671b", "nodes=128", "cluster=pyxis")

GPUS = dict.fromkeys(("gsm8k_qwen", "r1_16b", "r1_671b"), 8)
CHANGED = {
    **dict.fromkeys(("quickstart", "r1_tiny", "smollm"), ("pipeline.overrides=['model.dtype=bf16']",)),
    "r1_671b": ("from=r1_zero_32k", "until=math_drafts"),
}
"""Recipe of several stages -> its machine, and what makes its jobs ones that this machine runs: 16-bit numbers, and of
64 jobs three whose nodes there are."""


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
    said = planned(cluster, recipe, f"cluster={'apptainer' if len(recipe) % 2 else 'pyxis'}")
    assert said and [one for one in said if "to start at" not in one] == []


@pytest.mark.parametrize("recipe", ["pretrain_v3", "sft_v3"])
def test_slurm_accepts_a_job_of_1024_gpus(cluster, recipe):
    (said,) = planned(cluster, recipe, *V3, "cluster.gpus_per_node=8")
    assert "16384 processors" in said and "gpu[001-128]" in said


def test_slurm_accepts_the_stages_of_a_recipe_on_the_nodes_of_each(cluster):
    said = planned(cluster, "r1_671b")
    assert [one.partition("processors on nodes ")[2].split()[0] for one in said] == ["gpu[001-128]"] * 2 + ["gpu001"]


def test_check_reads_the_partitions_of_slurm(cluster, monkeypatch):
    """What SLURM itself prints, of nodes that are off too; `tests/check` has partitions without a SLURM."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    found = {one.name: one[1:] for one in partitions()}
    assert found == {"all": (None, 2, 0), "gpu": (None, 160, 0), "short": (60.0, 2, 0)}
    command = ("check.partition=short", "check.time_limit_minutes=90", "check.gpu=H100", "check.ranks=24")
    findings = check_command(JobCommand("pretrain", "pretrain", command)).findings[25]
    assert [one.change for one in findings if one.state is State.REFUSED] == [
        "take at most 60, and let the job be continued", "take fewer ranks, or another partition",
    ]  # fmt: skip


def test_slurm_refuses_what_it_has_no_nodes_for(cluster):
    (said,) = planned(cluster, "pretrain", "nodes=161", "train.global_batch_size=2576")
    assert "not available" in said
