"""`kill -9` of a random rank at a random moment, again and again: the run ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    "grpo", *only_read("grpo", COMMON), f"train.save_interval={INTERVAL}", "train.steps=12", "rollout=local",
    "rollout.max_response_tokens=32", "rl.prompts_per_rollout=2", "rl.group_size=4", "rl.updates_per_rollout=2",
]  # fmt: skip
SGLANG = [
    *GRPO, "rollout=sglang", "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
    # So far between that most rollouts are compared before they are dropped from the journal.
    "train.save_interval=8", "train.steps=24",
]  # fmt: skip


START_S = 5.0
"""In which a rank that is killed before its first step is killed."""


@dataclass
class Campaign:
    """What the kills did."""

    steps: int
    moments: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)
    runs: int = 0
    launches: int = 0


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_a_moment(job: Job, rank: psutil.Process, step: int, chance: random.Random) -> None:
    """Until the rank is anywhere in the step after this one, by the rows of the run, or has ended."""
    started = time.monotonic()
    while lives(rank):
        done = (job.rows or [{"step": 0}])[-1]["step"]
        if done >= step:
            pace = (time.monotonic() - started) / done if done else START_S
            with suppress(psutil.TimeoutExpired):
                rank.wait(chance.uniform(0.0, pace))
            return
        time.sleep(0.005)


def attempt(job: Job, chance: random.Random, seen: Campaign) -> int:
    """One launch, of which a rank is killed unless it ends before; its exit code."""
    rank, step = chance.randrange(2), max(0, chance.randrange(-seen.steps // 5, seen.steps))
    seen.launches += 1
    with launched(job) as launcher:
        target = ranks_of(job, launcher)[rank]
        wait_for_a_moment(job, target, step, chance)
        struck = lives(target)
        with suppress(psutil.NoSuchProcess):
            target.kill()
        killed = time.monotonic()
        code = end_of(job, launcher)
        if struck and code:
            done, saved = (job.rows or [{"step": 0}])[-1]["step"], job.saved
            seen.moments.append(f"rank {rank} at step {done}")
            seen.lost.append(done - saved)
            seen.seconds_to_end.append(time.monotonic() - killed)
        return code


def survive(
    arguments: list[str],
    root: Path,
    expected: list[dict],
    kills: int,
    seed: int,
    lost: int = INTERVAL,
    forked: bool = False,
    fresh_end: bool = False,
) -> Campaign:
    """Launch runs, again after each kill, until so many kills have struck; every run must end as the expected one.

    Launches are forked, if they may be; with `fresh_end` those that nobody kills are the command as users start it.
    """
    chance, seen = random.Random(seed), Campaign(len(expected))
    while len(seen.moments) < kills:
        job = Job(arguments, root, f"{arguments[0]}-{seed}-{seen.runs}")
        while True:
            if len(seen.moments) < kills and not is_done(job.folder):
                code = attempt(replace(job, forked=forked), chance, seen)
            else:
                last = replace(job, forked=forked and not fresh_end)
                with launched(last) as launcher:
                    code, seen.launches = end_of(last, launcher), seen.launches + 1
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
def reinforced(root: Path, pretrained: object) -> list[dict[str, Any]]:
    return undisturbed(Job([*GRPO, f"init.from='{root}/base'"], root, "reinforced", forked=True))


CAMPAIGNS = [
    pytest.param(1, 5, True, id="1 kill"),
    pytest.param(10, 2, False, id="10 kills", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]


@pytest.mark.timeout(300)  # launches of two ranks, on a slow processor half a minute each
@pytest.mark.dist
@pytest.mark.parametrize(("kills", "seed", "forked"), CAMPAIGNS)
def test_pretraining_survives_kills(kills, seed, forked, root, pretrained):
    survive([*PRETRAIN, *SHORT], root, pretrained, kills, seed, forked=forked)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("background", [False, True])
def test_a_long_run_survives_many_kills(background, root):
    """With saves in the background, the newest checkpoint may be the one before the one that is being written."""
    interval = 10
    arguments = [*PRETRAIN, "train.steps=200", f"train.save_interval={interval}"]
    expected = undisturbed(Job(arguments, root, f"long-{background}"))
    arguments += [f"train.async_save={str(background).lower()}"]
    survive(arguments, root, expected, 20, 5, interval * (1 + background))


@pytest.mark.timeout(300)
@pytest.mark.dist
@pytest.mark.parametrize(("kills", "seed", "forked"), CAMPAIGNS)
def test_reinforcement_survives_kills(kills, seed, forked, root, reinforced):
    arguments = [*GRPO, f"init.from='{root}/base'"]
    survive(arguments, root, reinforced, kills, seed, forked=forked, fresh_end=True)


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
    expected = undisturbed(calm)
    chance, seen, compared = random.Random(3), Campaign(len(expected)), 0
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
