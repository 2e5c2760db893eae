"""The preflight of a job: `srun ... python -m megatron_r1.cluster.preflight RUN_FOLDER VERB key=value ...`.

Each node checks itself, all nodes check what they share, and rank 0 prints one table. Any failure ends every rank with
the exit code of a preflight that failed. Bounded in time: each wait has an end, and the last resort is a timer.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hostlist

from megatron_r1.cluster.job import GPUS_PER_NODE
from megatron_r1.cluster.preflight.all_reduce import all_reduce
from megatron_r1.cluster.preflight.exchange import CHANGE, CHECK, Exchange
from megatron_r1.cluster.preflight.finding import FAILED, OK, NodeFinding, line_of, table
from megatron_r1.cluster.preflight.node import (
    check_disks,
    check_gpus,
    check_judges,
    check_ports,
    check_shared_memory,
)
from megatron_r1.config.command_line import parse
from megatron_r1.config.load import load_all
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ExitCode, UserError
from megatron_r1.pipeline.compose import compose_stages
from megatron_r1.pipeline.graph import selected
from megatron_r1.platform.launcher import local_rank, rank, ranks_from_srun, world_size
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.source import find_model

PORTS = "MEGATRON_R1_PORTS"
"""Variable of a job: ports of the servers of a node."""
WAIT_S = 60.0
"""Seconds for a node to start, and for its file to appear on the others."""
LINGER_S = 5.0
"""Seconds that other ranks wait before they exit with an error, so that rank 0 prints the table first."""
ALL_REDUCE_S = 180.0
"""Seconds for all ranks to import torch, to find each other and to sum."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process is in the job, and what the job expects there."""

    node: str
    nodes: tuple[str, ...]
    run: Path
    attempt: str

    @classmethod
    def here(cls, run: Path) -> Place:
        variables = os.environ
        nodes = tuple(hostlist.expand_hostlist(variables["SLURM_STEP_NODELIST"]))
        restarts = variables.get("SLURM_RESTART_COUNT", "0")
        step = f"{variables['SLURM_JOB_ID']}.{restarts}.{variables['SLURM_STEP_ID']}"
        return cls(variables["SLURMD_NODENAME"], nodes, run, step)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    run, *command = arguments
    place = Place.here(Path(run))
    os.environ.update(ranks_from_srun(os.environ))
    exchange = Exchange(place.run / ".preflight" / place.attempt, place.node, place.nodes, WAIT_S)
    config = load(command)
    found: list[NodeFinding] = []
    if local_rank() == 0:
        found = list(check_node(place, config))
        try:
            found += exchange.share(found)
        except OSError as error:
            found.append(NodeFinding(place.node, CHECK, FAILED, f"{error.filename}: {error.strerror}", CHANGE))
            print(table(found), file=sys.stderr)
            return int(ExitCode.PREFLIGHT_FAILED)
    if rank() == 0:
        found = exchange.gather()
        ok = all(one.state != FAILED for one in found)
        if not ok:  # before another rank ends, which ends this one
            print(table(found), file=sys.stderr, flush=True)
        exchange.decide(ok)
    if not exchange.wait_for_verdict():
        return end_after_rank_zero("the first node does not say that all nodes are as they must be")
    if world_size() > 1:
        found.append(run_all_reduce(place, "cuda" if config.platform == "cuda" else "cpu"))
    if rank() == 0:
        print(table(found), file=sys.stderr, flush=True)
    if all(one.state != FAILED for one in found):
        return int(ExitCode.DONE)
    return end_after_rank_zero(line_of(found[-1]))


def end_after_rank_zero(message: str) -> int:
    """The exit status of a failure. srun ends all ranks once one has ended: rank 0, which has the table, goes first."""
    if rank() != 0:
        print(message, file=sys.stderr, flush=True)
        time.sleep(LINGER_S)
    return int(ExitCode.PREFLIGHT_FAILED)


def load(command: list[str]) -> RunConfig:
    """The configuration of the job's command."""
    parsed = parse(command)
    return load_all(parsed.verb, parsed.overrides, parsed.recipe, find_model).config


def check_node(place: Place, config: RunConfig) -> Iterator[NodeFinding]:
    """All checks of this node alone."""
    gpus = int(os.environ.get(GPUS_PER_NODE) or os.environ.get("SLURM_GPUS_PER_NODE", "0").rpartition(":")[2])
    if gpus:
        yield from check_gpus(place.node, gpus)
    ports = [int(port) for port in os.environ.get(PORTS, "").split(",") if port]
    if rank() == 0 and world_size() > 1:  # listens where rank 0 is
        ports.append(int(os.environ["MASTER_PORT"]))
    if ports:
        yield from check_ports(place.node, ports)
    yield from check_disks(place.node, place.run)
    yield from check_shared_memory(place.node)
    yield from check_judges(place.node, judges(config))


def judges(config: RunConfig) -> list[str]:
    """Endpoints that the job's rewards call, of a recipe those of the stages that it runs."""
    found = [config.reward.judge_config.url] if config.reward.judge else []
    if config.pipeline.stages:
        names = selected(config.pipeline)
        stages = compose_stages(config, run_folder(config), names)
        settings = [stages[name].settings for name in names]
        found += [one["reward.judge_config.url"] for one in settings if one.get("reward.judge")]
    return list(dict.fromkeys(found))


def run_all_reduce(place: Place, device: str) -> NodeFinding:
    """The all-reduce as a finding. Where it hangs, a timer says so and ends this process."""
    change = "see NCCL and InfiniBand in launch/README.md; set cluster.network_interface"
    timer = threading.Timer(ALL_REDUCE_S + 10, give_up, [place, change])
    timer.daemon = True
    timer.start()
    try:
        shown = all_reduce(device, local_rank(), ALL_REDUCE_S)
    except (RuntimeError, OSError) as error:
        return NodeFinding(place.node, "all-reduce", FAILED, " ".join(str(error).split())[:300], change)
    finally:
        timer.cancel()
    return NodeFinding(place.node, "all-reduce", OK, shown)


def give_up(place: Place, change: str) -> None:
    what = f"rank {rank()} has not finished after {ALL_REDUCE_S:g} s"
    print(line_of(NodeFinding(place.node, "all-reduce", FAILED, what, change)), file=sys.stderr, flush=True)
    os._exit(int(ExitCode.PREFLIGHT_FAILED))


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"preflight: {' '.join(str(error).split())}", file=sys.stderr)
        status = int(error.exit_code)
    except Exception:
        traceback.print_exc()
        status = int(ExitCode.BUG)
    sys.exit(status)
