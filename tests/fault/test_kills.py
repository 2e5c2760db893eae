"""`kill -9` of a random rank at a random moment, again and again: the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import marked_processes

from megatron_r1.checkpoint.store import step_folders
from megatron_r1.rollout.journal import Journal
from megatron_r1.stages.session import is_done
from megatron_r1.track.record import read_metrics

INTERVAL = 2
"""Steps between checkpoints."""
COMMON = [
    "platform=cpu", "threads=1", "track=off", "seed=3", "data.num_documents=2000", "model.num_layers=2",
    "train.schedule.warmup_steps=2", f"train.checkpoint_interval={INTERVAL}",
]  # fmt: skip
PRETRAIN = [
    "pretrain", *COMMON, "train.steps=40", "train.sequence_length=64", "train.global_batch_size=4",
    "train.micro_batch_size=2",
]  # fmt: skip
GRPO = [
    "grpo", *COMMON, "train.steps=30", "rollout=local", "rollout.max_response_tokens=32", "rl.prompts_per_rollout=2",
    "rl.group_size=4", "rl.mini_batches=2",
]  # fmt: skip
SGLANG = [
    *GRPO, "rollout=sglang", "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
    # So many that no rollout is dropped from the journal before it is compared.
    "train.checkpoint_interval=8", "train.steps=24",
]  # fmt: skip
WALL_CLOCK = ("tokens_per_second", "mfu", "rollout_seconds", "train_seconds", "sync_seconds")
ATTEMPT_S = 100.0
SERVER_GRACE_S = 5.0
"""A server looks once a second whether the rank that started it still lives."""


@dataclass(frozen=True)
class Job:
    """One run from the command line, on two data-parallel ranks."""

    arguments: list[str]
    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint; 0 without any."""
        return next((step for step, _ in step_folders(self.folder / "checkpoints")), 0)


@contextlib.contextmanager
def launched(job: Job) -> Iterator[subprocess.Popen[str]]:
    """A launch of the job, with its own launcher; nothing that it started is left behind."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_r1", *job.arguments, f"root='{job.root}'", f"name={job.name}"]
    with (job.root / f"{job.name}.log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, text=True, env=os.environ | {"MEGATRON_R1_TEST": str(job.folder)}
        )
    try:
        yield process
    finally:
        for left in marked_processes(str(job.folder)):
            left.kill()
        process.wait()


def ranks_of(job: Job, launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The job's ranks, once there are two of them; none when the launcher has ended before."""
    while launcher.poll() is None:
        found = {int(process.environ().get("RANK", -1)): process for process in marked_processes(str(job.folder))}
        if {0, 1} <= found.keys():
            return found
        time.sleep(0.02)
    return {}


def end_of(job: Job, launcher: subprocess.Popen[str]) -> int:
    """Exit code of a launch, which takes everything that it started with it."""
    code = launcher.wait(ATTEMPT_S)
    deadline = time.monotonic() + SERVER_GRACE_S
    while (left := marked_processes(str(job.folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    return code


def undisturbed(job: Job) -> tuple[list[dict[str, Any]], float]:
    """The rows of a run that nothing kills, and how many seconds its ranks lived."""
    with launched(job) as launcher:
        assert ranks_of(job, launcher)
        started = time.monotonic()
        assert end_of(job, launcher) == 0, (job.root / f"{job.name}.log").read_text()
        return comparable(job.rows), time.monotonic() - started


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock says, their floats to the last bit."""
    return [
        {
            key: json.dumps(value, default=str) if not isinstance(value, float) else value.hex()
            for key, value in row.items()
        }
        for row in ({key: value for key, value in row.items() if key not in WALL_CLOCK} for row in rows)
    ]


@dataclass
class Campaign:
    """What the kills did."""

    life: float
    """Seconds that ranks live when nothing kills them."""
    moments: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)
    runs: int = 0
    launches: int = 0


def attempt(job: Job, chance: random.Random, seen: Campaign) -> int:
    """One launch, of which a rank is killed unless it ends before; its exit code."""
    rank, delay = chance.randrange(2), chance.uniform(0.0, seen.life)
    seen.launches += 1
    with launched(job) as launcher:
        ranks = ranks_of(job, launcher)
        started, struck = time.monotonic(), True
        try:
            ranks[rank].wait(delay)
            struck = False  # it had ended before
        except psutil.TimeoutExpired:
            ranks[rank].kill()
        killed = time.monotonic()
        code = end_of(job, launcher)
        if struck and code:
            done, saved = (job.rows or [{"step": 0}])[-1]["step"], job.saved
            seen.moments.append(f"rank {rank} after {delay:.1f} s, at step {done}")
            seen.lost.append(done - saved)
            seen.seconds_to_end.append(time.monotonic() - killed)
        if code == 0:
            seen.life = min(seen.life, killed - started)  # the machine may have become faster
        return code


def survive(arguments: list[str], root: Path, expected: list[dict], life: float, kills: int, seed: int) -> Campaign:
    """Launch runs, again after each kill, until so many kills have struck; every run must end as the expected one."""
    chance, seen = random.Random(seed), Campaign(life)
    while len(seen.moments) < kills:
        job = Job(arguments, root, f"{arguments[0]}-{seed}-{seen.runs}")
        while True:
            if len(seen.moments) < kills and not is_done(job.folder):
                code = attempt(job, chance, seen)
            else:
                with launched(job) as launcher:
                    code, seen.launches = end_of(job, launcher), seen.launches + 1
            if code == 0:
                break
            # A launch that nobody killed must end well.
            assert len(seen.moments) == seen.launches - seen.runs, (job.root / f"{job.name}.log").read_text()
        seen.runs += 1
        assert [row["step"] for row in job.rows] == list(range(1, len(expected) + 1))
        assert comparable(job.rows) == expected
    assert max(seen.lost) <= INTERVAL
    print(
        f"{arguments[0]}, seed {seed}: {kills} kills, {seen.launches} launches of {seen.runs} runs of {len(expected)}"
        f" equal rows; lost steps {seen.lost}; all down after at most {max(seen.seconds_to_end):.1f} s\n  "
        + "\n  ".join(seen.moments)
    )
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(root: Path) -> tuple[list[dict[str, Any]], float]:
    return undisturbed(Job(PRETRAIN, root, "base"))


@pytest.fixture(scope="module")
def reinforced(root: Path, pretrained: object) -> tuple[list[dict[str, Any]], float]:
    return undisturbed(Job([*GRPO, f"init.from='{root}/base'"], root, "reinforced"))


CAMPAIGNS = [
    pytest.param(2, 1, id="2 kills"),
    pytest.param(10, 2, id="10 kills", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]


@pytest.mark.dist
@pytest.mark.parametrize(("kills", "seed"), CAMPAIGNS)
def test_pretraining_survives_kills(kills, seed, root, pretrained):
    survive(PRETRAIN, root, *pretrained, kills, seed)


@pytest.mark.dist
@pytest.mark.parametrize(("kills", "seed"), CAMPAIGNS)
def test_reinforcement_survives_kills(kills, seed, root, reinforced):
    survive([*GRPO, f"init.from='{root}/base'"], root, *reinforced, kills, seed)


def asked(journal: Journal) -> dict[int, list[tuple]]:
    """Of each rollout what does not depend on the engine: prompts, groups, and the weights that answered."""
    return {
        step: [(s.prompt_id, s.group, s.prompt_tokens, s.weight_version) for s in journal.read(step) or ()]
        for step in journal.steps()
    }


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.sglang
@pytest.mark.timeout(1200)
def test_reinforcement_with_servers_survives_kills(root, pretrained):
    """An engine is no part of the run's state: bitwise up to the last journalled rollout, then the same requests."""
    arguments = [*SGLANG, f"init.from='{root}/base'"]
    calm = Job(arguments, root, "sglang")
    expected, life = undisturbed(calm)
    chance, seen, compared = random.Random(3), Campaign(life), 0
    while len(seen.moments) < 5:
        job, kept = Job(arguments, root, f"sglang-{seen.runs}"), Kept()
        while len(seen.moments) < 5 and attempt(job, chance, seen):
            kept.check_and_renew(job)
        if not is_done(job.folder):
            with launched(job) as launcher:
                assert end_of(job, launcher) == 0, (root / f"{job.name}.log").read_text()
        kept.check_and_renew(job)
        seen.runs, compared = seen.runs + 1, compared + kept.compared
        assert [row["step"] for row in job.rows] == list(range(1, len(expected) + 1))
        assert asked(Journal(rollouts_of(job))) == asked(Journal(rollouts_of(calm)))
    print(f"sglang: 5 kills of {seen.runs} runs; {compared} rows compared\n  " + "\n  ".join(seen.moments))
    assert compared


@dataclass
class Kept:
    """What a run had on disk when it was last looked at, and must never change again."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    journal: dict[str, bytes] = field(default_factory=dict)
    compared: int = 0

    def check_and_renew(self, job: Job) -> None:
        """Rows may be fewer for a while, since a resumed run records them anew from its checkpoint on."""
        rows = comparable(job.rows)
        journal = {path.name: path.read_bytes() for path in rollouts_of(job).glob("*.jsonl")}
        both = min(len(rows), len(self.rows))
        assert rows[:both] == self.rows[:both]
        assert self.journal.items() <= journal.items()
        self.compared += both
        self.rows, self.journal = max(rows, self.rows, key=len), journal


def rollouts_of(job: Job) -> Path:
    return job.folder / "rollouts"
