"""What nvidia-smi says of this node's GPUs. `unverified`: its parts are read from outputs as they are documented."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

TIMEOUT_S = 30.0
GPUS = ("--query-gpu=index,name,ecc.errors.uncorrected.volatile.total,memory.used", "--format=csv,noheader,nounits")
ROWS = ("--query-remapped-rows=remapped_rows.pending,remapped_rows.failure", "--format=csv,noheader")
SOUND = ("0", "no", "n/a", "not supported")
"""Values of fields that say that nothing is wrong, or nothing at all."""


@dataclass(frozen=True, slots=True)
class InstalledGpu:
    """One GPU."""

    index: str
    name: str
    used_mib: int
    """Memory in use, by any process."""
    faults: tuple[str, ...] = ()


def gpus() -> list[InstalledGpu]:
    """The GPUs that this process may see.

    Raises:
        OSError: nvidia-smi does not run, or fails; the message says how.
    """
    try:
        rows = _nvidia_smi(*ROWS)
    except OSError:  # GPUs before Ampere have no spare rows
        rows = ""
    return parse_gpus(_nvidia_smi(*GPUS), rows)


def parse_gpus(listed: str, rows: str = "") -> list[InstalledGpu]:
    """GPUs from the lines that nvidia-smi prints for `GPUS` and for `ROWS`."""
    remapped = [_fields(line) for line in rows.splitlines()]
    found = []
    for place, line in enumerate(listed.splitlines()):
        fields = _fields(line)
        if len(fields) != 4:
            raise OSError(f"nvidia-smi: {line}")
        index, name, errors, used = fields
        faults = [] if _sound(errors) else [f"{errors} uncorrected ECC errors since the driver started"]
        if place < len(remapped) and len(remapped[place]) == 2:
            pending, failure = remapped[place]
            faults += [] if _sound(pending) else ["a row waits to be remapped, which a reset does"]
            faults += [] if _sound(failure) else ["a row could not be remapped"]
        found.append(InstalledGpu(index, name, int(used) if used.isdecimal() else 0, tuple(faults)))
    return found


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split(",")]


def _sound(value: str) -> bool:
    return value.strip("[]").lower() in SOUND


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi does not answer in {TIMEOUT_S:g} s") from None
    except FileNotFoundError:
        raise OSError("no nvidia-smi here") from None
    if done.returncode:
        raise OSError(f"nvidia-smi: {' '.join((done.stdout + done.stderr).split())[:200]}")
    return done.stdout.strip()
