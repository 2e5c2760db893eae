"""Job scripts: what is filled in, what stays as a person reads it, and what is refused before anything is queued."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_r1.check.run import Report, check_command
from megatron_r1.cluster.job import job_script
from megatron_r1.cluster.request import command_to_check, requested_job
from megatron_r1.cluster.script import END, fill_in, scripts_folder
from megatron_r1.cluster.stages import stage_jobs
from megatron_r1.commands.serve import stage_of
from megatron_r1.commands.submit import show_job
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.errors import ConfigError

SCRIPTS = sorted(path.name for path in scripts_folder().glob("*.sh") if path.name != "job.sh")


def command(verb: str, *overrides: str) -> JobCommand:
    return JobCommand(verb, VERBS[verb].recipe, overrides)


def script(verb: str, *overrides: str) -> str:
    return job_script(requested_job(command(verb, *overrides), lambda _: None))


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_filling_in_changes_nothing_below_the_line(name):
    text = (scripts_folder() / name).read_text()
    directives = {"nodes": "3", "qos": None}
    filled = fill_in(text, directives, {"run": "runs/it's"}, ["--constraint=h100"], directives)
    assert filled.partition(END)[2] == text.partition(END)[2]
    changed = set(filled.splitlines()) ^ set(text.splitlines())
    assert {line.partition("=")[0] for line in changed} == {"#SBATCH --nodes", "#SBATCH --qos", "run",
                                                            "#SBATCH --constraint"}  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=filled, text=True).returncode == 0


def test_a_variable_that_the_script_lacks_is_an_error():
    with pytest.raises(KeyError, match="no variable colour"):
        fill_in((scripts_folder() / "train.sh").read_text(), {}, {"colour": "red"})


@pytest.mark.parametrize(
    ("profile", "present", "absent"),
    [
        ("venv", ["#SBATCH --gpus-per-node=8", "container=()", "srun_options=()"], ["#SBATCH --account"]),
        (
            "pyxis",
            ["srun_options=(--container-image=", "#SBATCH --account=", "env_file=.env"],
            ["#SBATCH --qos"],
        ),
        ("apptainer", ["container=(apptainer exec --nv --bind", "#SBATCH --qos=normal"], ["#SBATCH --mem"]),
    ],
)
def test_a_profile_gives_directives_and_container(profile, present, absent):
    text = script("pretrain", f"cluster={profile}", "nodes=2", "train.global_batch_size=256")
    assert [start for start in present if not lines_of(text, start)] == []
    assert [start for start in absent if lines_of(text, start)] == []


def test_a_job_gets_the_command_without_the_cluster_and_a_platform():
    text = script("pretrain", "cluster.gpus_per_node=1", "name=mine", "check.warn_only=[1]", "time_limit=01:00:00")
    assert lines_of(text, "arguments=") == ["arguments=(pretrain --config-name pretrain name=mine platform=cuda)"]


@pytest.mark.parametrize("mode", ["requeue", "chain", "singleton", "none"])
def test_only_one_mode_lets_slurm_requeue(mode):
    text = script("pretrain", "cluster.gpus_per_node=1", f"restart={mode}")
    assert bool(lines_of(text, "#SBATCH --requeue")) == (mode == "requeue")
    assert bool(lines_of(text, "#SBATCH --no-requeue")) == (mode != "requeue")
    assert bool(lines_of(text, "#SBATCH --dependency=singleton")) == (mode == "singleton")


def test_engine_nodes_divide_the_allocation():
    overrides = ("init.from=base", "nodes=3", "engine_nodes=2", "cluster.gpus_per_node=4")
    text = script("grpo", *overrides, "rollout.sglang.server.tensor_parallel=2")
    assert "engine_nodes=2" in text.splitlines() and "servers_per_node=2" in text.splitlines()
    config = requested_job(command("grpo", *overrides), lambda _: None)
    assert "check.ranks=4" in command_to_check(command("grpo", *overrides), config).overrides


def checked(verb: str, recipe: str, *overrides: str) -> Report:
    job = JobCommand(verb, recipe, overrides)
    return check_command(command_to_check(job, requested_job(job, lambda _: None)))


def test_a_job_is_checked_as_it_will_run():
    """On GPUs, although `platform` chooses here; and on all of its nodes."""
    assert 7 in checked("pretrain", "pretrain", "cluster.gpus_per_node=2", "parallel.context=2").refused
    lines = ("init.from=base", "nodes=3", "engine_nodes=2", "cluster.gpus_per_node=4")
    assert (
        "check.nodes=3"
        in command_to_check(command("grpo", *lines), requested_job(command("grpo", *lines), lambda _: None)).overrides
    )


def test_stages_of_a_recipe_are_checked_with_their_own_ranks():
    report = checked("pipeline", "quickstart", "cluster.gpus_per_node=2", "parallel.tensor=2", "platform=cpu")
    assert not {2, 5, 8} & {*report.refused}, [report.findings[number] for number in report.refused]


def test_a_dry_run_shows_every_job_with_its_configuration(capsys):
    config = requested_job(JobCommand("pipeline", "r1_tiny", ("until=r1_zero", "platform=cpu")), lambda _: None)
    show_job(config)
    shown = capsys.readouterr().out
    for stage in stage_jobs(config):
        assert f"# runs/r1_tiny/jobs/r1_tiny.{stage}/jobs/config.yaml\n" in shown


def test_engines_may_be_a_component_of_their_own():
    overrides = ("init.from=base", "nodes=5", "engine_nodes=2", "cluster.gpus_per_node=4", "restart=chain")
    text = script("grpo", *overrides, "submit.heterogeneous=true", "cluster.sbatch_options=['--constraint=h100']")
    trainer, engines = text.partition(END)[0].split("#SBATCH hetjob\n")
    assert lines_of(trainer, "#SBATCH --nodes") == ["#SBATCH --nodes=3"]
    assert lines_of(engines, "#SBATCH --nodes") == ["#SBATCH --nodes=2"]
    assert lines_of(trainer, "#SBATCH --job-name") == ["#SBATCH --job-name=r1_zero"]
    assert lines_of(engines, "#SBATCH --job-name") == ["#SBATCH --job-name=r1_zero.engines"]
    assert lines_of(trainer, "#SBATCH --no-requeue") and not lines_of(engines, "#SBATCH --no-requeue")
    assert lines_of(trainer, "#SBATCH --constraint") == lines_of(engines, "#SBATCH --constraint") != []
    assert lines_of(engines, "trainer_nodes=") == ["trainer_nodes=3"]
    assert lines_of(engines, "ranks_per_node=") == ["ranks_per_node=4"]


RECIPE_OF_NODES = (
    "pipeline.overrides=['model.dtype=bf16']", "pipeline.stages.pretrain.ranks=8", "cluster.gpus_per_node=4",
    "pipeline.stages.r1_zero.ranks=4", "until=evaluate",
)  # fmt: skip
"""Stages on two nodes, on one node with servers on another one, and on one node."""


def test_a_recipe_is_a_job_for_each_stage_in_order():
    config = requested_job(JobCommand("pipeline", "quickstart", RECIPE_OF_NODES), lambda _: None)
    jobs = stage_jobs(config)
    assert [*jobs] == ["pretrain", "r1_zero", "evaluate"]
    for stage, job in jobs.items():
        (arguments,) = lines_of(job_script(job, Path("runs/quickstart") / stage), "arguments=")
        assert f"pipeline.only={stage} " in f"{arguments[:-1]} " and "until" not in arguments
        assert "arguments=(pipeline " in arguments and "platform=cuda" in arguments
        assert lines_of(job_script(job), "run=") == [f"run=runs/quickstart/jobs/quickstart.{stage}"]


def test_each_stage_of_a_recipe_gets_the_nodes_that_its_ranks_and_servers_need(capsys):
    config = requested_job(JobCommand("pipeline", "quickstart", RECIPE_OF_NODES), lambda _: None)
    scripts = {stage: job_script(job).splitlines() for stage, job in stage_jobs(config).items()}
    for stage, lines in {
        "pretrain": ["#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4"],
        "r1_zero": ["#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "engine_nodes=1", "servers_per_node=4"],
        "evaluate": ["#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"],
    }.items():
        assert [line for line in lines if line not in scripts[stage]] == [], stage
    assert "engine_nodes=1" not in scripts["pretrain"]
    show_job(config)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["pretrain", "2", "8", "32"], ["r1_zero", "2", "1", "8", "32"], ["evaluate", "1", "4", "16"]):
        assert row in shown
    assert "cost: 3 jobs, the largest of 2 nodes, 8 GPUs, each at most 04:00:00: 80 GPU hours".split() in shown


def test_nodes_of_a_whole_recipe_are_refused_with_where_those_of_its_stages_are_shown():
    with pytest.raises(ConfigError, match="submit.nodes=2: .* dry_run=true shows"):
        requested_job(JobCommand("pipeline", "quickstart", ("nodes=2",)), lambda _: None)


def test_the_servers_of_a_stage_run_its_own_configuration():
    lines = (*RECIPE_OF_NODES, "pipeline.only=r1_zero", "until=''", "rollout.sglang.slurm.nodes=job",
             "rollout.sglang.slurm.ports=[12001,12002]", "cluster.gpus_per_node=1")  # fmt: skip
    recipe = requested_job(JobCommand("pipeline", "quickstart", lines), lambda _: None)
    rollout = stage_of(recipe).rollout
    assert rollout.sglang.slurm.ports == [12001, 12002] and rollout.sglang.started_elsewhere
    with pytest.raises(ConfigError, match="pipeline.only=: must name the stage"):
        stage_of(requested_job(JobCommand("pipeline", "quickstart", RECIPE_OF_NODES), lambda _: None))


@pytest.mark.parametrize(
    ("verb", "overrides", "key"),
    [
        ("pipeline", ["restart=singleton"], "submit.restart"),
        ("pipeline", ["nodes=2"], "submit.nodes"),
        ("grpo", ["init.from=base", "submit.heterogeneous=true"], "submit.heterogeneous"),
        ("grpo", ["init.from=base", "nodes=2", "engine_nodes=1", "submit.heterogeneous=true"], "submit.restart"),
        ("pretrain", ["nodes=2", "engine_nodes=1"], "submit.engine_nodes"),
        ("grpo", ["init.from=base", "engine_nodes=1"], "engine_nodes"),
        ("grpo", ["init.from=base", "nodes=2", "engine_nodes=1", "rollout=local"], "submit.engine_nodes"),
        ("sample", ["init.from=base", "nodes=2"], "submit.nodes"),
        ("sample", [], "init.from"),
        ("pretrain", ["rl.group_size=4"], "rl.group_size"),
        ("pretrain", ["submit.time_limit=4h"], "time_limit"),
        ("pretrain", ["time_limit=00:05:00"], "signal_before_s"),
        ("pretrain", ["cluster.container=pyxis"], "image"),
        ("pretrain", ["cluster.gpus_per_node=0"], "ranks_per_node"),
        ("pretrain", ["cluster.gpu=H1000"], "cluster.gpu"),
        ("pretrain", ["parallel.tensor=3"], "parallel.tensor"),
    ],
)
def test_what_cannot_run_is_refused_before_it_queues(verb, overrides, key):
    with pytest.raises(ConfigError) as refused:
        script(verb, "cluster.gpus_per_node=1", *overrides)
    assert refused.value.key.endswith(key)
