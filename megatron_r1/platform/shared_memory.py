"""Folders of this program in /dev/shm: their names say which job made them, so that what a kill left can be removed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

MEMORY = Path("/dev/shm")
PREFIX = "megatron_r1-"
MADE_BY_JOB = re.compile(rf"{PREFIX}\w+-job(\d+)\.(\d+)-")
QUERY_S = 20.0


def make_folder(purpose: str, environment: Mapping[str, str] = os.environ) -> Path:
    """A new folder in /dev/shm, or where there is none, among the temporary files; the caller removes it."""
    job, restarts = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
    maker = f"job{job}.{restarts}-" if job else ""
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-{maker}", dir=MEMORY if MEMORY.is_dir() else None))


def left_over(folder: Path = MEMORY) -> list[Path]:
    """Folders of this program and this user."""
    found = sorted(folder.glob(f"{PREFIX}*"))
    return [path for path in found if path.lstat().st_uid == os.getuid()]


def maker_is_gone(path: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the job that made a folder is known to have ended: an earlier attempt of this job, or one that SLURM does
    not run any more. Not known means no."""
    made = MADE_BY_JOB.match(path.name)
    if not made or "SLURM_JOB_ID" not in environment:
        return False
    if made[1] == environment["SLURM_JOB_ID"]:
        return int(made[2]) < int(environment.get("SLURM_RESTART_COUNT", "0"))
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", f"--jobs={made[1]}", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=QUERY_S,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
    return set(done.stdout.split()) <= set(ended)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
