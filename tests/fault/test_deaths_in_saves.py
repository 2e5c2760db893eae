"""A rank that dies at a named point of a save: the checkpoints before it are whole, and the run goes on from them."""

from __future__ import annotations

import json
import random
import re
from itertools import cycle, islice
from pathlib import Path

import pytest

from megatron_r1.checkpoint.manifest import verify
from megatron_r1.checkpoint.store import step_folders
from tests.support.dying_ranks import POINTS
from tests.support.jobs import INTERVAL, PRETRAIN, SHORT, Job, comparable, end_of, launched, undisturbed

PROGRAM = str(Path(__file__).parents[1] / "support" / "dying_ranks.py")


def die(job: Job, point: str, chance: random.Random) -> str:
    """One launch of the job in which a rank dies; where, and what was left."""
    only = POINTS[point]
    rank = chance.randrange(2) if only is None else only
    passes = 0 if point == "verifying" else chance.randrange(2)
    order = json.dumps({"point": point, "rank": rank, "passes": passes})
    before = job.saved
    with launched(job, MEGATRON_R1_DIES=order) as launcher:
        assert end_of(job, launcher) != 0, f"no rank died at {point}"
    assert job.saved >= before
    for _, checkpoint in step_folders(job.folder / "checkpoints"):
        verify(checkpoint)
    done = (job.rows or [{"step": 0}])[-1]["step"]
    return f"{point} on rank {rank}: row {done}, checkpoint {job.saved}"


def survive(job: Job, expected: list[dict], points: list[str], lost: int, seed: int) -> None:
    chance, seen = random.Random(seed), []
    for point in points:
        seen.append(die(job, point, chance))
        done, saved = (int(words.split()[-1]) for words in seen[-1].split(": ")[1].split(", "))
        assert done - saved <= lost, seen[-1]
    whole = Job(job.arguments, job.root, job.name, forked=job.forked)
    with launched(whole) as launcher:
        assert end_of(whole, launcher) == 0, job.log
    assert comparable(job.rows) == expected
    print(f"{len(points)} deaths inside saves, {len(points)} resumes:\n  " + "\n  ".join(seen))


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_the_run_resumes(root, pretrained):
    arguments = [*PRETRAIN, *SHORT, "train.async_save=true"]
    job = Job(arguments, root, "dies", PROGRAM, forked=True)
    survive(job, pretrained, ["mid_shard", "before_rename"], 2 * INTERVAL, 1)
    # Rank 1 waited for it outside of collective operations; the launcher kills it 30 s after its TERM.
    assert re.search(r"megatron-r1: rank 0 on \S+ gave no sign of life for 1\d s after a signal; the last", job.log)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("background", ["false", "true"])
def test_the_run_resumes_from_every_point(background, root):
    """Both ranks hold experts, so that both have shards to write."""
    arguments = [*PRETRAIN, "train.steps=120", f"train.save_interval={INTERVAL}", "parallel.expert=2"]
    expected = undisturbed(Job(arguments, root, f"experts-{background}"))
    arguments += [f"train.async_save={background}"]
    points = list(islice(cycle([*list(POINTS)[1:], "verifying"]), 25))
    lost = INTERVAL * (2 if background == "true" else 1)
    survive(Job(arguments, root, f"dies-{background}", PROGRAM, forked=True), expected, points, lost, 2)
