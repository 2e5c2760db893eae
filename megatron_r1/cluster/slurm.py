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
    return _sbatch(["--test-only", *options, str(script)]).stderr.strip().removeprefix("sbatch: ")


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a job; returns its id.

    Raises:
        PlatformError: SLURM refuses it.
    """
    return _sbatch(["--parsable", *options, str(script)]).stdout.strip().partition(";")[0]


def release(job: str) -> None:
    """Let a job start that was submitted with --hold."""
    subprocess.run(["scontrol", "release", job], check=True)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs."""
    subprocess.run(["scancel", *jobs], check=True)


def _sbatch(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if not shutil.which("sbatch"):
        raise PlatformError("sbatch: no such program: submit from a login node of a SLURM cluster, or use dry_run=true")
    done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlatformError(f"SLURM refuses the job: {done.stderr.strip()}")
    return done
