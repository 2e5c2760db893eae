"""Jobs that are stopped in the middle go on with the losses of a job that was not, in each of the restart modes.

One pair of mode and stop runs always, all of them by `-m slow`; the jobs of the fixtures run beside it. Chains go on in
test_recipes.py, generations here by the clock.
"""

from __future__ import annotations

import pytest

from tests.slurm.conftest import STOPS, TINY, Cluster, losses
from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
JOB = (
    "pretrain", *TINY, "train.steps=20", "train.save_interval=5", "train.schedule.lr_decay_style=constant",
)  # fmt: skip
MODES = ("requeue", "chain", "singleton")
ALWAYS = (("requeue", "signal"),)


@pytest.fixture(scope="module", autouse=True)
def undisturbed(cluster) -> str:
    """A job that nothing stops: its name."""
    cluster.submit(*JOB, "name=undisturbed", "time_limit=00:30:00")
    return "undisturbed"


@pytest.fixture(scope="module", autouse=True)
def generations(cluster) -> str:
    """A job whose attempts the clock, 599 s before the limit, stops after their first step: its name."""
    clock = ("train.save_before_limit_s=599", "submit.generations=3", "train.steps=2", "time_limit=00:10:00")
    cluster.submit(*JOB, "name=generations", "restart=singleton", *clock)
    return "generations"


@pytest.fixture(scope="module", autouse=True)
def stuck(cluster) -> str:
    """A job whose rank ends at its start, without a checkpoint: its name."""
    cluster.submit(
        *JOB, "name=stuck", "restart=chain", "submit.max_restarts_without_progress=1", "cluster.python=/bin/false",
        "time_limit=00:30:00",
    )  # fmt: skip
    return "stuck"


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        pytest.param(mode, how, marks=[] if (mode, how) in ALWAYS else pytest.mark.slow)
        for mode in MODES
        for how in STOPS
    ],
)
def test_a_stopped_job_goes_on(cluster: Cluster, undisturbed, mode, how):
    name = f"{mode}_{how}"
    job = cluster.submit(*JOB, f"name={name}", f"restart={mode}", "submit.generations=6", *STOPS[how])
    cluster.wait_for_step(name)
    stopped = cluster.stop(name, job, how)
    assert stopped == (mode == "requeue" or how != "requeue"), "SLURM requeues no job that has --no-requeue"
    states = cluster.wait_for_all()
    assert losses(cluster.run_folder(name)) == losses(cluster.run_folder(undisturbed)), cluster.logs()
    attempts = [number for number, _ in cluster.attempts(name)]
    assert len(attempts) > 1 if stopped else attempts == [job]
    assert set(attempts) == {job} if mode == "requeue" else len(set(attempts)) == len(attempts)
    assert states[attempts[-1]] == "COMPLETED"
    assert {states[number] for number in cluster.queued(name) if number not in attempts} <= {"CANCELLED"}


def test_generations_stop_by_the_clock_and_the_last_is_cancelled(cluster, undisturbed, generations):
    states = cluster.wait_for_all()
    assert losses(cluster.run_folder(generations)) == losses(cluster.run_folder(undisturbed))[:2]
    assert [states[job] for job, _ in cluster.attempts(generations)] == ["FAILED", "COMPLETED"]
    assert [states[job] for job in cluster.queued(generations)] == ["COMPLETED", "CANCELLED"]


def test_restarts_without_progress_stop_and_say_why(cluster, stuck):
    states = cluster.wait_for_all()
    assert len(cluster.attempts(stuck)) == 2 and "PENDING" not in states.values()
    stopped = cluster.run_folder(stuck) / "logs" / "stopped.txt"
    assert "1 restarts without progress" in stopped.read_text()
    mended = cluster.submit(*JOB, f"name={stuck}", "restart=none", "cluster.python=/bin/true", "time_limit=00:30:00")
    assert cluster.wait_for_all()[mended] == "COMPLETED" and not stopped.exists(), "submitted again, it starts anew"
