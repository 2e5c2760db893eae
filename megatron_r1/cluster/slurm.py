"""SLURM's commands."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.errors import PlatformError


def expected_start(script: Path, options: Sequence[str] = ()) -> str:
    """When the job would start, as `sbatch --test-only` says it.

    Raises:
        PlatformError: SLURM would refuse the job.
    """
    return _run("sbatch", "--test-only", *options, str(script)).stderr.strip().removeprefix("sbatch: ")


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a job; returns its id.

    Raises:
        PlatformError: SLURM refuses it.
    """
    return _run("sbatch", "--parsable", *options, str(script)).stdout.strip().partition(";")[0]


def in_queue(scripts: Sequence[Path]) -> list[str]:
    """This user's jobs that run one of these scripts or wait to, those that a chain's jobs have queued among them."""
    ours = {script.resolve() for script in scripts}
    shown = (line.partition(" ") for line in _run("squeue", "--me", "--noheader", "--format=%i %o").stdout.splitlines())
    return [job for job, _, command in shown if Path(command.strip()).resolve() in ours]


def release(job: str) -> None:
    """Let a job start that was submitted with --hold."""
    _run("scontrol", "release", job)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs."""
    _run("scancel", *jobs)


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of SLURM.

    Raises:
        PlatformError: it is not there, or fails.
    """
    if not shutil.which(program):
        needed = "submit from a login node of a SLURM cluster, or use dry_run=true"
        raise PlatformError(f"{program}: no such program: {needed}")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        refused = "SLURM refuses the job" if program == "sbatch" else f"{program} fails"
        raise PlatformError(f"{refused}: {done.stderr.strip()}")
    return done
