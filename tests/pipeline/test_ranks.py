"""The ranks of a stage as processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.pipeline.ranks import RankProcesses, forwarding_signals


def end_of(job: RankProcesses, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    while (code := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.close()
    return code


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({}, 1),
        ({"tensor": 2}, 2),
        ({"expert": 2}, 2),
        ({"tensor": 2, "expert": 2}, 2),
        ({"pipeline": 2, "tensor": 2}, 4),
    ],
)
def test_a_stage_takes_as_few_ranks_as_its_degrees_need(degrees: dict[str, int], ranks: int) -> None:
    assert ParallelConfig(**degrees).fewest_ranks() == ranks


def test_the_first_failing_ranks_code_comes_back_and_no_rank_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_r1.pipeline.ranks.GRACE_S", 0.5)
    program = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(85)"
    assert end_of(RankProcesses([sys.executable, "-c", program], 2)) == 85
    assert not [child for child in psutil.Process().children() if "time.sleep(60)" in " ".join(child.cmdline())]


def test_ranks_are_numbered(tmp_path: Path) -> None:
    program = f"import os; open(r'{tmp_path}/' + os.environ['RANK'] + os.environ['WORLD_SIZE'], 'w')"
    assert end_of(RankProcesses([sys.executable, "-c", program], 3)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["03", "13", "23"]


def test_a_warning_ends_no_rank_that_starts() -> None:
    program = (
        "import sys, time; from megatron_r1 import stop_signal; time.sleep(0.2); sys.exit(40 + stop_signal.received())"
    )
    with forwarding_signals() as signals:
        signals.jobs.append(job := RankProcesses([sys.executable, "-c", program], 2))
        os.kill(os.getpid(), signal.SIGUSR1)  # ranks have hardly been forked
        assert end_of(job) == 41
    assert signals.received == [signal.SIGUSR1]


def test_lines_of_jobs_side_by_side_carry_a_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.write('no newline')"
    jobs = [RankProcesses([sys.executable, "-c", program], 1, prefix) for prefix in ("a: ", "b: ")]
    assert [end_of(job) for job in jobs] == [0, 0]
    lines = capsys.readouterr().err
    assert all(f"{prefix}{line}" in lines for prefix in ("a: ", "b: ") for line in ("out\n", "err\n", "no newline"))
