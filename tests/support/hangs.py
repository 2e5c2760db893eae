"""Faults in ranks of real runs: a rank that is stopped, killed, sleeps for ever, raises, refuses, has NaN, or waits for
a server that never answers. Each run starts once the fault of the one before it has struck, after which that one waits.

    python tests/support/hangs.py FOLDER --kinds stopped,raising --number 2 --seed 0

Ranks are forks of this program, which has imported everything, and run the command line on gloo without a launcher:
each of them has to end by itself. FOLDER/found.json tells what became of each case.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.platform.ports import reserve_ports
from tests.support.fork_server import import_verbs

RUN = [
    "pretrain", "platform=cpu", "threads=1", "track=off", "seed=3", "data.num_documents=300", "model.num_layers=2",
    "model.mtp.num_layers=0", "train.schedule.warmup_steps=2", "train.sequence_length=32", "train.global_batch_size=6",
    "train.micro_batch_size=1", "train.steps=6", "train.save_interval=1", "train.save_total_limit=9",
]  # fmt: skip
GRPO = [
    "grpo", "platform=cpu", "threads=1", "track=off", "seed=3", "model.num_layers=2",
    "model.mtp.num_layers=0", "train.schedule.warmup_steps=2", "train.steps=6", "train.save_interval=1",
    "train.save_total_limit=9", "rollout=local", "rollout.max_response_tokens=8", "rl.prompts_per_rollout=2",
    "rl.group_size=2", "rl.updates_per_rollout=1",
]  # fmt: skip
WATCH = ("watch.step_deadline_s", "watch.save_deadline_s", "watch.rollout_deadline_s", "watch.heartbeat_deadline_s")
NOTICE_S = 8.0
"""In which others learn of a rank's new phase: it says so within 1 s, and they read it every quarter of a deadline."""
BOUND_S = 60.0
"""Seconds in which a run has to end after its fault, on a slow machine."""
END_S = 120.0
"""Seconds from its start in which a run has to end, or it is killed."""
POLL_S = 0.05
AT_ONCE = 3
"""Runs that may wait beside each other; more of them would take each other's time."""
KINDS = ("stopped", "killed", "asleep", "raising", "refusing", "nan", "server")
PHASES = ("step", "update", "save")


@dataclass(frozen=True)
class Fault:
    kind: str
    rank: int
    ranks: int
    phase: str
    step: int

    @property
    def command(self) -> list[str]:
        return GRPO if self.kind == "server" else RUN

    @property
    def job(self) -> str:
        """Name of the run that nothing disturbs."""
        return f"undisturbed-{self.command[0]}-{self.ranks}"


@dataclass
class CaseOutcome:
    """What became of a case."""

    fault: Fault
    codes: dict[int, int]
    """Exit codes by rank; of a rank that had to be killed, minus the signal."""
    seconds: float
    """From the fault until the last rank has ended, those that cannot end left out."""
    logs: dict[int, str]
    stacks: dict[int, str]
    heartbeat: dict[str, Any]
    checkpoints: dict[int, dict[str, str]]
    """Step -> name and hash of the files of each checkpoint that verifies."""
    rows: list[dict[str, Any]]


def draw(kind: str, chance: random.Random) -> Fault:
    """A case: 2 or 3 ranks, any of them, at any place of one of its steps."""
    if kind == "server":  # rank 0 alone talks to servers
        return Fault(kind, 0, 2, "rollout", chance.randint(2, 5))
    ranks = chance.choice((2, 3))
    # Of a rank killed in a save nobody learns but by its launcher, which these ranks have not.
    phase = "update" if kind == "nan" else chance.choice(PHASES[: 2 if kind == "killed" else 3])
    return Fault(kind, chance.randrange(ranks), ranks, phase, chance.randint(2, 5))


def install(fault: Fault, struck: Path) -> None:
    """Have this process commit its fault when it comes to the place."""
    from megatron_r1.parallel import phases

    move_to = phases.PhaseClock.move_to

    def faulty(self: Any, name: Any, step: int | None = None) -> None:
        move_to(self, name, step)
        if (self.current.phase, self.current.step) == (fault.phase, fault.step) and not struck.exists():
            struck.write_text(str(time.time()))
            commit(fault)

    phases.PhaseClock.move_to = faulty  # type: ignore[method-assign]


def commit(fault: Fault) -> None:
    if fault.kind in ("stopped", "killed"):
        time.sleep(NOTICE_S)
        os.kill(os.getpid(), signal.SIGSTOP if fault.kind == "stopped" else signal.SIGKILL)
    elif fault.kind == "refusing":
        raise NoRolloutCapacity("the refusal of this test")
    elif fault.kind == "server":
        waiting_for_a_server()
    elif fault.kind == "asleep":
        sleeping_for_ever()
    elif fault.kind == "raising":
        raise ValueError("the fault of this test")
    else:
        make_gradients_nan()


def sleeping_for_ever() -> None:
    while True:
        time.sleep(1)


def waiting_for_a_server() -> None:
    """A request to a server that takes it and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\n\r\n")
        client.recv(1)


def make_gradients_nan() -> None:
    """In the next backward pass, of this rank alone; its loss is finite."""
    import torch

    from megatron_r1.train import update as module

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan")

    scaled = module._scaled

    def poisoned(forward: Any, scale: int) -> Any:
        module._scaled = scaled
        inner = scaled(forward, scale)

        def run(model: Any, micro_batch: Any) -> Any:
            output, loss_function = inner(model, micro_batch)

            def poisoned_loss(output: Any) -> Any:
                loss, logged = loss_function(output)
                return Poison.apply(loss), logged

            return output, poisoned_loss

        return run

    module._scaled = poisoned


def start(fault: Fault | None, ranks: int, root: Path, name: str, arguments: list[str]) -> dict[int, int]:
    """Start the ranks of a run; their process ids."""
    [port], started = reserve_ports(1), {}
    for rank in range(ranks):
        if pid := os.fork():
            started[rank] = pid
            continue
        try:
            with (root / f"{name}-{rank}.log").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            signal.alarm(300)  # whatever happens to the parent
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            socket.gethostname = lambda: f"node{rank}"  # noqa: B023 (this process has one rank)
            if fault and rank == fault.rank:
                install(fault, root / f"{name}.struck")
            from megatron_r1.__main__ import exit_code

            base = [f"init.from='{root}/undisturbed-pretrain-2'"] if arguments[0] == "grpo" else []
            os._exit(exit_code([*arguments, *base, f"root='{root}'", f"name={name}"]))
        finally:
            os._exit(99)
    return started


class Running:
    """A run whose ranks are started and have to end by themselves."""

    def __init__(self, fault: Fault | None, ranks: int, root: Path, name: str, arguments: list[str]):
        self.fault, self.root, self.name = fault, root, name
        self.codes: dict[int, int] = {}
        """Exit codes of the ranks that have ended."""
        self.seconds = 0.0
        """From the fault to the end."""
        self._started = start(fault, ranks, root, name, arguments)
        self._stopped = {fault.rank} if fault and fault.kind == "stopped" else set()
        self._deadline = time.monotonic() + END_S

    @property
    def struck(self) -> bool:
        return (self.root / f"{self.name}.struck").exists()

    def ended(self) -> bool:
        """Whether the run is over: all ranks that can end have, or too much time has passed."""
        for rank in self._started.keys() - self.codes.keys() - self._stopped:
            pid, status = os.waitpid(self._started[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        left = self._started.keys() - self.codes.keys()
        if left - self._stopped and time.monotonic() < self._deadline:
            return False
        if self.struck and not self.seconds:
            self.seconds = time.time() - float((self.root / f"{self.name}.struck").read_text())
        self.kill()
        return True

    def kill(self) -> None:
        """End the ranks that still run."""
        for rank in self._started.keys() - self.codes.keys():
            os.kill(self._started[rank], signal.SIGKILL)
            self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self._started[rank], 0)[1])


def run(ranks: int, root: Path, name: str, arguments: list[str]) -> dict[int, int]:
    """Exit codes of a run without a fault."""
    running = Running(None, ranks, root, name, arguments)
    try:
        while not running.ended():
            time.sleep(POLL_S)
    finally:
        running.kill()
    return running.codes


def examine(fault: Fault, running: Running) -> CaseOutcome:
    root, name, folder = running.root, running.name, running.root / running.name
    ranks = range(fault.ranks)
    stacks = {rank: folder / "logs" / f"stacks-rank-{rank:05}.txt" for rank in ranks}
    return CaseOutcome(
        fault,
        running.codes,
        round(running.seconds, 1),
        {rank: (root / f"{name}-{rank}.log").read_text(errors="replace") for rank in ranks},
        {rank: path.read_text() for rank, path in stacks.items() if path.exists()},
        json.loads((folder / "heartbeat.json").read_text()),
        checkpoints_of(folder),
        rows_of(folder),
    )


def strike_in_turn(faults: dict[str, Fault], root: Path, deadline_s: float) -> Iterator[CaseOutcome]:
    """The outcomes of these runs by name, each as it ends."""
    watch = [f"{key}={deadline_s}" for key in WATCH]
    coming, running = list(faults.items()), dict[str, Running]()
    try:
        while coming or running:
            if coming and len(running) < AT_ONCE and all(one.struck for one in running.values()):
                name, fault = coming.pop(0)
                running[name] = Running(fault, fault.ranks, root, name, fault.command + watch)
            for name in [name for name, one in running.items() if one.ended()]:
                yield examine(faults[name], running.pop(name))
            time.sleep(POLL_S)
    finally:
        for one in running.values():
            one.kill()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    from megatron_r1.track.metrics import reproducible
    from megatron_r1.track.record import read_metrics

    return [reproducible(row) for row in read_metrics(folder / "metrics.jsonl")]


def checkpoints_of(folder: Path) -> dict[int, dict[str, str]]:
    from megatron_r1.checkpoint.manifest import verify
    from megatron_r1.checkpoint.store import step_folders

    return {
        step: {name: str(record) for name, record in verify(path).files.items()}
        for step, path in step_folders(folder / "checkpoints")
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--number", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=12, help="seconds; a busy machine may pause a rank for some")
    given = parser.parse_args(arguments)
    import_verbs("pretrain", "grpo")
    chance = random.Random(given.seed)
    kinds = given.kinds.split(",")
    faults = {f"{kind}-{number}": draw(kind, chance) for kind in kinds for number in range(given.number)}
    undisturbed, outcomes = {}, []
    for fault in (Fault("", 0, 2, "", 0), *faults.values()):  # the first is the base of grpo's
        if fault.job not in undisturbed:
            codes = run(fault.ranks, given.folder, fault.job, fault.command)
            assert set(codes.values()) == {0}, codes
            folder = given.folder / fault.job
            undisturbed[fault.job] = {"checkpoints": checkpoints_of(folder), "rows": rows_of(folder)}
    for outcome in strike_in_turn(faults, given.folder, given.deadline):
        outcomes.append(outcome)
        print(outcome.fault, outcome.codes, f"{outcome.seconds:.1f} s", flush=True)
        found = {"outcomes": [asdict(outcome) for outcome in outcomes], "undisturbed": undisturbed}
        (given.folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
