"""check: whether a job can run, before it queues: one table, one exit status, without GPUs and without torch."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.check.finding import State
from megatron_r1.check.run import CHECKS, Report, check_command
from megatron_r1.config.verbs import JobCommand
from megatron_r1.errors import ExitCode

STYLES = {State.REFUSED: "bold red", State.WARNING: "yellow", State.UNKNOWN: "cyan"}
WIDTH = 150
SHOWN = 6
"""Findings of a check that the table shows."""


def run_command(command: JobCommand) -> int:
    """Check a command and print the table; the exit status is that of a refused configuration where a check refuses."""
    report = check_command(command)
    show(report, f"megatron-r1 check {command.verb} --config-name {command.recipe}")
    return int(ExitCode.BAD_CONFIG if report.refused else ExitCode.DONE)


def show(report: Report, title: str) -> None:
    """Print a report as one table, and one line with what it comes to."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH if not console.is_terminal else 0)
    table = Table(title=title, title_justify="left")
    for column, width in (("", 2), ("check", 30), ("state", 7), ("what", None), ("change", None)):
        table.add_column(column, width=width, overflow="fold")
    for check in CHECKS:
        state = report.state(check.number)
        if not (report.readable or state is State.REFUSED):
            continue
        shown = sorted(report.findings.get(check.number, ()), key=lambda found: -found.state)
        more = [f"... and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
        what = "\n".join([found.text for found in shown[:SHOWN]] + more)
        change = "\n".join(dict.fromkeys(found.change for found in shown[:SHOWN] if found.change))
        table.add_row(str(check.number), check.title, state.text, escape(what), escape(change), style=STYLES.get(state))
    console.print(table)
    for line in _refusals(report):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_sum(report))


def _refusals(report: Report) -> Iterator[str]:
    """What refuses the job, a line each, as it stands in no column."""
    for number in report.refused:
        found = [one for one in report.findings[number] if one.state is State.REFUSED]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield f"refused by {number}: {found[0].text}{f': {found[0].change}' if found[0].change else ''}{more}"


def _sum(report: Report) -> str:
    states = [report.state(check.number) for check in CHECKS]
    counts = [f"{states.count(state)} {state.text}" for state in reversed(State) if states.count(state)]
    return f"{', '.join(counts)}: the job {'is refused' if report.refused else 'may queue'}"
