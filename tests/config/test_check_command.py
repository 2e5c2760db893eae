"""The command line of `check`, in a process of its own."""

from __future__ import annotations

import pytest

DEADLINE_S = 5.0


def test_the_command_prints_one_table_and_exits_by_what_it_found(run_command) -> None:
    done = run_command("check", "pretrain", "parallel.tensor=2", "check.ranks=3")
    assert done.status == 2 and "1 REFUSED" in done.stdout and "parallel.tensor=2" in done.stdout
    assert done.processor_seconds < DEADLINE_S
    fine = run_command("check", "pretrain")
    assert fine.status == 0 and "the job may queue" in fine.stdout


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (["train.stepz=3"], "refused by 1: train.stepz=3: no such key; did you mean train.steps?"),
        (["--config-name", "pretrain_v4"], "refused by 1: --config-name=pretrain_v4: must be one of average, "),
    ],
)
def test_what_cannot_be_read_is_one_line_and_one_row(run_command, mistake: list[str], line: str) -> None:
    done = run_command("check", "pretrain", *mistake)
    said, total = done.stdout.splitlines()[-2:]
    assert done.status == 2 and said.startswith(line) and total == "1 REFUSED, 28 unknown: the job is refused"
    assert "ranks against degrees" not in done.stdout and not done.stderr


@pytest.mark.parametrize("arguments", [["check"], ["check", "check"], ["check", "parallel.tensor=2"]])
def test_a_check_of_nothing_is_refused(run_command, arguments: list[str]) -> None:
    done = run_command(*arguments)
    assert done.status == 2 and "check takes the command of one of pretrain" in done.stderr
