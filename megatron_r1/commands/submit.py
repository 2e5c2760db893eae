"""submit: a verb as a job of a SLURM cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_r1.check.run import check_command
from megatron_r1.cluster import slurm
from megatron_r1.cluster.job import job_script, script_name
from megatron_r1.cluster.request import command_to_check, requested_job
from megatron_r1.cluster.stages import stage_jobs
from megatron_r1.commands.check import show
from megatron_r1.config.load import as_yaml, write_yaml
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import JobCommand
from megatron_r1.errors import ExitCode, PlatformError
from megatron_r1.files import write_whole
from megatron_r1.pipeline.show import aligned
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.source import find_model

console = Console(highlight=False, soft_wrap=True, markup=False)


def run_command(command: JobCommand) -> int:
    """Check a command, write its script and resolved configuration into the run's folder, and submit it.

    A dry run shows script and configuration of a job that a check refuses, too.

    Returns:
        The exit status, that of a refused configuration where a check refuses the job.

    Raises:
        ConfigError: a key is not allowed.
        PlatformError: SLURM refuses the job.
    """
    config = requested_job(command, find_model)
    report = check_command(command_to_check(command, config))
    if config.submit.dry_run:
        show_job(config)
    if report.refused:
        show(report, f"megatron-r1 check {command.verb} --config-name {command.recipe}")
        return int(ExitCode.BAD_CONFIG)
    if not config.submit.dry_run:
        submit(config)
    return int(ExitCode.DONE)


def show_job(config: RunConfig) -> None:
    """Print what `submit` would write."""
    jobs = jobs_of(config)
    for job, output in jobs:
        script = script_path(job)
        console.print(f"# {script}\n{job_script(job, output)}")
        console.print(f"# {script.with_name('config.yaml')}\n{as_yaml(job)}")
    console.print(cost(jobs))


def jobs_of(config: RunConfig) -> list[tuple[RunConfig, Path]]:
    """The jobs of a command, each with the folder that shows its progress: of a recipe one for each stage."""
    folder = run_folder(config)
    if config.submit.command == "pipeline" and config.submit.stage_jobs:
        return [(job, folder / stage) for stage, job in stage_jobs(config).items()]
    return [(config, folder)]


def submit(config: RunConfig) -> None:
    """Write and submit the job, and those that wait for it: stages of a recipe, or generations.

    The first stage is held until all others wait for it: it may be over, or have queued its next link, before.

    Raises:
        PlatformError: SLURM refuses one of the jobs, and then none is left in the queue; or the run has one there.
    """
    jobs = jobs_of(config)
    check_queue(config, [script_path(job) for job, _ in jobs])
    console.print(cost(jobs))
    hold = ["--hold"] if len(jobs) > 1 else []
    submitted: list[str] = []
    try:
        for job, output in jobs:
            script = write_job(job, output)
            after = [f"--dependency=afterok:{submitted[-1]}", "--kill-on-invalid-dep=yes"] if submitted else hold
            if not submitted:
                console.print(f"start: {slurm.expected_start(script)}")
            numbers = [slurm.submit(script, after) for _ in range(number_of_jobs(job))]
            submitted += numbers
            with (run_folder(job) / "logs" / "queued.txt").open("a") as queued:
                queued.writelines(f"{number}\n" for number in numbers[1:])
            console.print(instructions(run_folder(job), numbers))
    except PlatformError:
        if submitted:
            slurm.cancel(submitted)
            console.print(f"cancelled: job {' '.join(submitted)}")
        raise
    if hold:
        slurm.release(submitted[0])


def check_queue(config: RunConfig, scripts: list[Path]) -> None:
    """Refuse a second job of a run, which would end because of the first, and cancel what is to go on with the run.

    Jobs of restart=singleton start one after the other, whenever they were submitted.

    Raises:
        PlatformError: names the job.
    """
    if config.submit.restart != "singleton" and (found := slurm.in_queue(scripts)):
        raise PlatformError(f"job {' '.join(found)} of {run_folder(config)} runs or waits: cancel it first, by scancel")


def script_path(config: RunConfig) -> Path:
    """The job's script, once it is written."""
    return run_folder(config) / "jobs" / script_name(config)


def write_job(config: RunConfig, output: Path) -> Path:
    """Write script and configuration; returns the script."""
    script, folder = script_path(config), run_folder(config)
    script.parent.mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    write_yaml(config, script.with_name("config.yaml"))
    write_whole(script, job_script(config, output).encode())
    return script


def number_of_jobs(config: RunConfig) -> int:
    """Jobs that are queued at once."""
    return config.submit.generations if config.submit.restart == "singleton" else 1


def cost(jobs: Sequence[tuple[RunConfig, Path]]) -> str:
    """What the jobs take at most; of the stages of a recipe, what each takes, and all of them."""
    submit, hours = jobs[0][0].submit, sum(_gpu_hours(job) for job, _ in jobs)
    number = sum(number_of_jobs(job) for job, _ in jobs)
    if len(jobs) == 1:
        several = f"{number} jobs of " if number > 1 else ""
        size = f"{submit.nodes} nodes, {_gpus(jobs[0][0])} GPUs"
        return f"cost: {several}{size}, at most {submit.time_limit}: {hours:g} GPU hours"
    rows = [("stage", "nodes", "engine nodes", "GPUs", "GPU hours")]
    for job, output in jobs:
        nodes, engine = job.submit.nodes, job.submit.engine_nodes
        rows.append((output.name, f"{nodes}", f"{engine or ''}", f"{_gpus(job)}", f"{_gpu_hours(job):g}"))
    largest = max((job for job, _ in jobs), key=_gpus)
    size = f"{largest.submit.nodes} nodes, {_gpus(largest)} GPUs"
    total = f"cost: {number} jobs, the largest of {size}, each at most {submit.time_limit}: {hours:g} GPU hours"
    return f"{aligned(rows)}\n{total}"


def _gpus(job: RunConfig) -> int:
    return job.submit.nodes * job.cluster.gpus_per_node


def _gpu_hours(job: RunConfig) -> float:
    """GPU hours of a job at its time limit, those that are queued with it included."""
    return _gpus(job) * job.submit.seconds / 3600 * number_of_jobs(job)


def instructions(folder: Path, jobs: list[str]) -> str:
    """How to follow, enter and cancel the job."""
    return "\n".join(
        [
            f"submitted: job {' '.join(jobs)}",
            f"follow:    tail -F {folder}/logs/job-{jobs[0]}.log {folder}/logs/latest/*.log",
            f"enter:     srun --jobid={jobs[0]} --overlap --pty bash",
            f"stop:      scancel --signal=USR1 --batch {jobs[0]}   (saves; goes on as submit.restart says)",
            f"cancel:    scancel $(cat {folder}/logs/queued.txt) {jobs[0]}",
        ]
    )
