"""Checks of the request against SLURM's partition, and of the time limit against checkpoints."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.check.finding import Check, Finding, Job, passed, refused, unknown

SLURM_TIMEOUT_S = 3.0
_CLOCK = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


class Partition(NamedTuple):
    """What SLURM allows in a partition."""

    name: str
    minutes: float | None
    """Longest time limit; None is without limit."""
    nodes: int
    gpus: int
    """GPUs of a node, 0 where SLURM shows none."""


def partitions() -> list[Partition] | None:
    """The partitions, the default one first; None where SLURM does not answer.

    Their nodes are counted by `scontrol`: `sinfo` leaves out nodes that a cloud starts for a job.
    """
    listed = _output("scontrol", "--oneliner", "show", "partition")
    if listed is None:
        return None
    gpus = _gpus_of_nodes()
    found = [dict(pair.split("=", 1) for pair in line.split() if "=" in pair) for line in listed.splitlines() if line]
    found.sort(key=lambda fields: fields["Default"] != "YES")
    return [
        Partition(name := one["PartitionName"], minutes_of(one["MaxTime"]), int(one["TotalNodes"]), gpus.get(name, 0))
        for one in found
    ]


def _gpus_of_nodes() -> dict[str, int]:
    """Partition -> most GPUs of one of the nodes that `sinfo` shows."""
    found: dict[str, int] = {}
    for line in (_output("sinfo", "--noheader", "--format=%R|%G") or "").split():
        name, _, resources = line.partition("|")
        if gpus := re.search(r"gpu:(?:[\w.-]+:)?(\d+)", resources):
            found[name] = max(found.get(name, 0), int(gpus[1]))
    return found


def _output(*command: str) -> str | None:
    """What a program of SLURM prints; None where it is missing, fails or does not answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def minutes_of(limit: str) -> float | None:
    """A time limit as SLURM writes it, [days-][hours:]minutes:seconds, in minutes; None is without limit."""
    found = _CLOCK.fullmatch(limit)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _request(job: Job) -> Iterator[Finding]:
    machine = job.config.check
    known = partitions()
    yield from _time(job)
    if known is None:
        yield unknown("SLURM does not answer here", "check on a login node of the cluster")
        return
    named = [one for one in known if machine.partition in ("", one.name)]
    if not named:
        names = ", ".join(one.name for one in known)
        yield refused(f"check.partition={machine.partition}: there is none of this name", f"take one of {names}")
        return
    limit, nodes = named[0].minutes, named[0].nodes
    needed = machine.nodes or (-(-job.ranks // machine.gpus_per_node) if job.on_gpus else 1)
    if limit is not None and machine.time_limit_minutes > limit:
        text = f"check.time_limit_minutes={machine.time_limit_minutes}: {named[0].name} allows {limit:g} minutes"
        yield refused(text, f"take at most {limit:g}, and let the job be continued")
    if needed > nodes:
        yield refused(f"{needed} nodes: {named[0].name} has {nodes}", "take fewer ranks, or another partition")
    if job.on_gpus and named[0].gpus and machine.gpus_per_node > named[0].gpus:
        text = f"check.gpus_per_node={machine.gpus_per_node}: nodes of {named[0].name} have {named[0].gpus}"
        yield refused(text, f"take {named[0].gpus}")


def _time(job: Job) -> Iterator[Finding]:
    machine, train = job.config.check, job.config.train
    if not machine.time_limit_minutes or not job.trains:
        return
    if not machine.step_seconds:
        yield unknown(
            "how long a step takes is not known here", "set check.step_seconds from the times at the end of a run's log"
        )
        return
    between, limit = machine.step_seconds * train.save_interval / 60, machine.time_limit_minutes
    text = f"{between:.0f} minutes between checkpoints, {limit} minutes of a job"
    if between > limit:
        steps = max(1, int(limit * 60 / machine.step_seconds / 4))
        yield refused(f"{text}: it would end before it saves", f"take train.save_interval={steps}")
    else:
        yield passed(text)


CHECKS = (Check(25, "request against partition, time against saves", _request),)
