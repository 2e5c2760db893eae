"""`kill -9` of a random rank at a random moment, again and again: the run ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_r1.config.keys import only_read
from megatron_r1.rollout.journal import Journal
from megatron_r1.runs.folder import is_done
from tests.support.jobs import (
    COMMON,
    INTERVAL,
    PRETRAIN,
    SHORT,
    Job,
    comparable,
    end_of,
    launched,
    ranks_of,
    undisturbed,
)
from tests.support.samples import prompt_of

GRPO = [
    "grpo", *only_read("grpo", COMMON), f"train.save_interval={INTERVAL}", "train.steps=30", "rollout=local",
    "rollout.max_response_tokens=32", "rl.prompts_per_rollout=2", "rl.group_size=4", "rl.updates_per_rollout=2",
]  # fmt: skip
SGLANG = [
    *GRPO, "rollout=sglang", "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
    # So far between that most rollouts are compared before they are dropped from the journal.
    "train.save_interval=8", "train.steps=24",
]  # fmt: skip


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


def survive(
    arguments: list[str], root: Path, expected: list[dict], life: float, kills: int, seed: int, lost: int = INTERVAL
) -> Campaign:
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
            assert len(seen.moments) == seen.launches - seen.runs, job.log
        seen.runs += 1
        assert [row["step"] for row in job.rows] == list(range(1, len(expected) + 1))
        assert comparable(job.rows) == expected
    assert max(seen.lost) <= lost
    print(
        f"{arguments[0]}, seed {seed}: {kills} kills, {seen.launches} launches of {seen.runs} runs of {len(expected)}"
        f" equal rows; lost steps {seen.lost}; all down after at most {max(seen.seconds_to_end):.1f} s\n  "
        + "\n  ".join(seen.moments)
    )
    return seen


@pytest.fixture(scope="module")
def reinforced(root: Path, pretrained: object) -> tuple[list[dict[str, Any]], float]:
    return undisturbed(Job([*GRPO, f"init.from='{root}/base'"], root, "reinforced"))


CAMPAIGNS = [
    pytest.param(1, 1, id="1 kill"),
    pytest.param(10, 2, id="10 kills", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]


@pytest.mark.timeout(300)  # launches of two ranks, on a slow processor half a minute each
@pytest.mark.dist
@pytest.mark.parametrize(("kills", "seed"), CAMPAIGNS)
def test_pretraining_survives_kills(kills, seed, root, pretrained):
    expected, life = pretrained
    survive([*PRETRAIN, *SHORT], root, expected, life, kills, seed)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("background", [False, True])
def test_a_long_run_survives_many_kills(background, root):
    """With saves in the background, the newest checkpoint may be the one before the one that is being written."""
    interval = 10
    arguments = [*PRETRAIN, "train.steps=200", f"train.save_interval={interval}"]
    expected, life = undisturbed(Job(arguments, root, f"long-{background}"))
    arguments += [f"train.async_save={str(background).lower()}"]
    survive(arguments, root, expected, life, 20, 5, interval * (1 + background))


@pytest.mark.timeout(300)
@pytest.mark.dist
@pytest.mark.parametrize(("kills", "seed"), CAMPAIGNS)
def test_reinforcement_survives_kills(kills, seed, root, reinforced):
    expected, life = reinforced
    survive([*GRPO, f"init.from='{root}/base'"], root, expected, life, kills, seed)


def pairs(journal: Journal) -> dict[int, list[tuple]]:
    """Of each rollout what does not depend on the engine: prompts, groups, and the weights that answered."""
    return {
        step: [(s.prompt_id, s.group, prompt_of(s), s.weight_version) for s in journal.read(step) or ()]
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
                assert end_of(job, launcher) == 0, job.log
        kept.check_and_renew(job)
        seen.runs, compared = seen.runs + 1, compared + kept.compared
        assert [row["step"] for row in job.rows] == list(range(1, len(expected) + 1))
        assert pairs(Journal(rollouts_of(job))) == pairs(Journal(rollouts_of(calm)))
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
        journal = {path.name: path.read_bytes() for path in rollouts_of(job).glob("*.rollout")}
        both = min(len(rows), len(self.rows))
        assert rows[:both] == self.rows[:both]
        assert all(journal[name] == self.journal[name] for name in journal.keys() & self.journal.keys())
        self.compared += both
        self.rows, self.journal = max(rows, self.rows, key=len), journal


def rollouts_of(job: Job) -> Path:
    return job.folder / "rollouts"
