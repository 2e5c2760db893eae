"""Every layout and every set of switches that is shipped: `check` passes the jobs that it names, on their machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1.check import layout_files, slurm, storage
from megatron_r1.check.finding import State
from megatron_r1.check.layout_files import LayoutJob, layout_jobs, needed_gb
from megatron_r1.check.run import check_command
from megatron_r1.check.slurm import Partition
from megatron_r1.config.recipes import configs_folder, groups

FILES = layout_files.layout_files()
JOBS = [job for path in FILES for job in layout_jobs(path)]
UNVERIFIED = "# unverified: nobody has run it with this project on GPUs.\n"
RUN = {"plain"}
"""Switches with which the project's own tests train."""
BROUGHT = {18, 19, 21}
"""Checks of weights, tokenizer and data, which a user brings."""
MEMORY = 13


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with room on its disk and a partition of 512 nodes."""
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e17))
    monkeypatch.setattr(slurm, "partitions", lambda: [Partition("gpu", None, 512, 0)])


def title(job: LayoutJob) -> str:
    return "-".join([job.layout, job.command.verb, *job.command.overrides[2:]])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_layout_names_its_jobs_and_that_nobody_ran_it(path: Path) -> None:
    assert path.read_text().startswith(UNVERIFIED)
    jobs = layout_jobs(path)
    assert jobs and path.read_text().count("# Job:") == len(jobs), "an entry that cannot be read"
    assert all(f"parallel={path.stem}" in job.command.overrides for job in jobs)
    assert all("check.gpu=" in " ".join(job.command.overrides) for job in jobs)


@pytest.mark.parametrize("job", JOBS, ids=title)
def test_check_passes_a_layouts_job_with_the_memory_that_its_comment_says(job: LayoutJob) -> None:
    """Where the memory differs on purpose, `python -m megatron_r1.check.layout_files` writes the figures anew."""
    report = check_command(job.command)
    assert {number: report.findings[number] for number in report.refused if number not in BROUGHT} == {}
    assert report.state(MEMORY) in (State.PASSED, State.WARNING)
    assert job.memory_gb == pytest.approx(needed_gb(job.command), abs=0.051)


@pytest.mark.parametrize("name", sorted({*groups()["performance"]} - RUN))
def test_switches_say_that_nobody_ran_them_and_belong_to_a_layout(name: str) -> None:
    assert (configs_folder() / "performance" / f"{name}.yaml").read_text().startswith(UNVERIFIED)
    assert any(f"performance={name}" in job.command.overrides for job in JOBS)
