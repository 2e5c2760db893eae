"""What a run came from, of each of its attempts: `provenance/0001.json` and on in its folder, without secrets.

A run is the attempts of one command; each may run other code, on other machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform as machine
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_r1.config.command_line import parse
from megatron_r1.config.recipes import PACKAGE
from megatron_r1.config.secrets import secrets_of, without_secrets
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole
from megatron_r1.platform.installed import driver, lock, versions
from megatron_r1.platform.kernels import apex_extensions
from megatron_r1.platform.source_code import source_code

FOLDER = "provenance"
ENVIRONMENT = "environment.json"
"""In the run's folder: the newest attempt's record."""
IMAGE, IMAGE_DIGEST = "MEGATRON_R1_IMAGE", "MEGATRON_R1_IMAGE_DIGEST"
"""Variables of a job: the container's image and its digest, from the cluster's profile."""
SLURM = {
    "job": "SLURM_JOB_ID",
    "name": "SLURM_JOB_NAME",
    "cluster": "SLURM_CLUSTER_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "tasks": "SLURM_NTASKS",
    "restarts": "SLURM_RESTART_COUNT",
    "array_job": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "components": "SLURM_HET_SIZE",
}


def record_attempt(folder: Path) -> None:
    """Write the record of the attempt that starts here, and beside it what differs from the commit."""
    attempts = folder / FOLDER
    attempts.mkdir(exist_ok=True)
    number = 1 + max((int(path.stem) for path in attempts.glob("[0-9]*.json")), default=0)
    facts, diff = attempt_facts()
    if diff:
        text = diff.decode("utf-8", "surrogateescape")
        masked = without_secrets(text, secrets_of()).encode("utf-8", "surrogateescape")
        # By content: attempts with the same changes share a file.
        name = f"{hashlib.sha256(masked).hexdigest()[:16]}.diff"
        write_whole(attempts / name, masked)
        facts["git"] |= {"diff": f"{FOLDER}/{name}", "diff_masked": masked != diff}
    record = json.dumps({"attempt": number} | facts, indent=1).encode()
    write_whole(attempts / f"{number:04d}.json", record)
    write_whole(folder / ENVIRONMENT, record)


def newest_record(folder: Path) -> dict[str, Any]:
    """The record of the run's newest attempt, for its page in a tracker; empty where there is none."""
    path = folder / ENVIRONMENT
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return record


def attempt_facts(environment: Mapping[str, str] = os.environ) -> tuple[dict[str, Any], bytes]:
    """What this process runs, where and from which code, without secrets; and how that code differs from its commit,
    as it is."""
    installed = lock()
    code = source_code(PACKAGE.parent)
    git = asdict(code)
    diff = git.pop("diff")
    if not code.unknown:
        git["diff_complete"] = len(diff) == code.diff_bytes
    slurm = {key: environment[name] for key, name in SLURM.items() if name in environment}
    facts = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": command(sys.argv),
        "git": git,
        "lock": asdict(installed) if installed else None,
        "versions": versions(),
        "apex": apex_extensions(),
        "python": machine.python_version(),
        "driver": driver(),
        "system": machine.platform(),
        "cores": os.cpu_count(),
        "container": container(environment),
        "slurm": {"restarts": "0"} | slurm if "job" in slurm else None,
    }
    masked: dict[str, Any] = _masked(facts, secrets_of(environment))
    return masked, diff


def command(line: list[str]) -> dict[str, Any]:
    """The command line, and where it is this program's, its verb, recipe and overrides."""
    found: dict[str, Any] = {"line": [sys.executable, *line]}
    try:
        parsed = parse(line[1:])
        return found | {"verb": parsed.verb, "recipe": parsed.recipe, "overrides": parsed.overrides}
    except (ConfigError, KeyError):  # another program, such as a test
        return found


def container(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The container's image and its digest; None where the job's profile names none."""
    image = environment.get(IMAGE, "")
    return {"image": image, "digest": environment.get(IMAGE_DIGEST) or "unknown"} if image else None


def _masked(value: Any, secrets: tuple[str, ...]) -> Any:
    """The same value, without secrets in its texts."""
    match value:
        case str():
            return without_secrets(value, secrets)
        case dict():
            return {key: _masked(item, secrets) for key, item in value.items()}
        case list() | tuple():
            return [_masked(item, secrets) for item in value]
        case _:
            return value
