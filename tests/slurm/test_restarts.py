"""Jobs that are stopped in the middle go on with the losses of a job that was not, in each of the restart modes."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import TINY, losses
from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
JOB = (
    "pretrain", *TINY, "time_limit=00:10:00", "train.steps=100", "train.save_interval=200",
    "train.schedule.lr_decay_style=constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cluster) -> list[float]:
    cluster.submit(*JOB, "name=undisturbed")
    cluster.wait_for_all()
    return losses(cluster.run_folder("undisturbed"))


@pytest.mark.slow
def test_a_requeued_job_goes_on(cluster, undisturbed):
    """`scontrol requeue` sends TERM, after which the job queues again."""
    job = cluster.submit(*JOB, "name=requeued", "restart=requeue")
    cluster.wait_for_step("requeued")
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    cluster.wait_for_all()
    assert losses(cluster.run_folder("requeued")) == undisturbed
    assert len(cluster.attempts("requeued")) == 2 and {first for first, _ in cluster.attempts("requeued")} == {job}


def test_a_job_that_is_signalled_requeues_itself(cluster, undisturbed):
    """USR1 to the job's shell, as SLURM sends it before the time limit."""
    job = cluster.submit(*JOB, "name=signalled", "restart=requeue")
    cluster.wait_for_step("signalled")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait_for_all()
    assert losses(cluster.run_folder("signalled")) == undisturbed
    assert len(cluster.attempts("signalled")) == 2


def test_a_chain_goes_on_with_the_next_job_and_leaves_none_queued(cluster, undisturbed):
    job = cluster.submit(*JOB, "name=chained", "restart=chain")
    cluster.wait_for_step("chained")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    states = cluster.wait_for_all()
    assert losses(cluster.run_folder("chained")) == undisturbed
    (first, _), (second, _) = cluster.attempts("chained")
    assert (first, states[first], states[second]) == (job, "FAILED", "COMPLETED") and second != job


def test_generations_stop_by_the_clock_and_the_last_is_cancelled(cluster, undisturbed):
    """The clock, 599 s before the limit, stops every attempt after its first step; the third job is not needed."""
    clock = ("train.save_before_limit_s=599", "submit.generations=3", "train.steps=2")
    cluster.submit(*JOB, "name=generations", "restart=singleton", *clock)
    states = cluster.wait_for_all()
    assert losses(cluster.run_folder("generations")) == undisturbed[:2]
    assert [states.pop(job) for job, _ in cluster.attempts("generations")] == ["FAILED", "COMPLETED"]
    assert "CANCELLED" in states.values()


def test_restarts_without_progress_stop_and_say_why(cluster, undisturbed):
    """A rank that is killed at its start leaves no checkpoint."""
    cluster.submit(
        *JOB, "name=stuck", "restart=chain", "submit.max_restarts_without_progress=1", "cluster.python=/bin/false",
    )  # fmt: skip
    states = cluster.wait_for_all()
    assert len(cluster.attempts("stuck")) == 2 and "PENDING" not in states.values()
    stopped = cluster.run_folder("stuck") / "logs" / "stopped.txt"
    assert "1 restarts without progress" in stopped.read_text()
    cluster.submit(*JOB, "name=stuck", "restart=none")
    cluster.wait_for_all()
    assert losses(cluster.run_folder("stuck")) == undisturbed, "what was mended is submitted again, and goes on"
    assert not stopped.exists()
