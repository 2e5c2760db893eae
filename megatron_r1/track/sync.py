"""Uploads offline runs of wandb, each by wandb's own `sync`, which goes on where it was stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from megatron_r1.errors import PlatformError

KEY, BASE_URL = "WANDB_API_KEY", "WANDB_BASE_URL"
REACH_TIMEOUT_S = 10.0
UPLOAD_TIMEOUT_S = 3600.0
"""Seconds for one run; the next call goes on with it."""


def offline_runs(folder: Path) -> list[Path]:
    """The files of offline runs anywhere below a folder that are not uploaded as they are now, the oldest first."""
    files = [file for file in folder.rglob("wandb/offline-run-*/run-*.wandb") if not is_uploaded(file)]
    return sorted(files, key=lambda file: file.parent.name)


def is_uploaded(file: Path) -> bool:
    """Whether a run was uploaded and has not grown since."""
    marker = marker_of(file)
    return marker.is_file() and marker.stat().st_mtime_ns >= file.stat().st_mtime_ns


def marker_of(file: Path) -> Path:
    """The empty file by which wandb marks an uploaded run."""
    return file.with_name(f"{file.name}.synced")


def check_server(environment: Mapping[str, str]) -> None:
    """Refuse to begin without a key or a server that answers.

    Raises:
        PlatformError: the environment has no key, or the server cannot be reached.
    """
    if not environment.get(KEY):
        raise PlatformError(f"{KEY} is not set: an upload needs the key of a wandb account in the environment")
    url = environment.get(BASE_URL) or "https://api.wandb.ai"
    try:
        urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise PlatformError(f"{BASE_URL}={url}: cannot be reached ({reason}); nothing was uploaded") from None


def upload(file: Path) -> str:
    """Upload one run and mark it; returns why it failed, empty where it did not."""
    before = file.stat().st_mtime_ns
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(file)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=UPLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {UPLOAD_TIMEOUT_S:.0f} s"
    if done.returncode or not marker_of(file).is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"wandb sync ended with exit code {done.returncode}"
    # A run that grew while it was uploaded is uploaded again by the next call.
    os.utime(marker_of(file), ns=(before, before))
    return ""
