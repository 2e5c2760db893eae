"""What the comments of configs/parallel say: for which jobs a layout is meant, and how much memory each takes.

A layout's comment has for each job two parts, of which the first may go on in indented lines:

    # Job: pretrain --config-name pretrain_v3 model=v3_671b parallel=v3_671b_h100_1024 performance=v3_671b_h100
    #   check.gpu=H100 check.ranks=1024
    # Memory: 79.7 GB

A job is what stands after `megatron-r1 check`. `python -m megatron_r1.check.layout_files` writes the memory anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.check.finding import Job
from megatron_r1.check.memory import stages_of
from megatron_r1.config.load import load
from megatron_r1.config.recipes import configs_folder
from megatron_r1.config.verbs import JobCommand
from megatron_r1.memory.parts import GB

_ENTRY = re.compile(r"^# Job: (?P<job>.*(?:\n#  +.*)*)\n# Memory: (?P<memory>[\d.]+) GB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class LayoutJob:
    """A job for which a layout is meant."""

    layout: str
    command: JobCommand
    memory_gb: float
    """Memory of the largest rank as the comment says, in gigabytes (10^9 bytes)."""


def layout_files() -> list[Path]:
    """All layouts."""
    return sorted((configs_folder() / "parallel").glob("*.yaml"))


def layout_jobs(path: Path) -> list[LayoutJob]:
    """The jobs of a layout's comment."""
    entries = _ENTRY.finditer(path.read_text(encoding="utf-8"))
    return [LayoutJob(path.stem, _command(entry["job"]), float(entry["memory"])) for entry in entries]


def needed_gb(command: JobCommand) -> float:
    """Memory of the largest rank of a job in gigabytes, as `check` predicts it."""
    config = load(command.verb, command.overrides, command.recipe)
    return max(stage.total for stage in stages_of(Job(command.verb, config))) / GB


def _command(text: str) -> JobCommand:
    verb, flag, recipe, *overrides = text.replace("\n#", " ").split()
    if flag != "--config-name":
        raise ValueError(f"{text}: needs --config-name after the verb")
    return JobCommand(verb, recipe, tuple(overrides))


def _written_anew(entry: re.Match[str]) -> str:
    start, end = entry.span("memory")
    text, first = entry[0], entry.start()
    return f"{text[: start - first]}{needed_gb(_command(entry['job'])):.1f}{text[end - first :]}"


def _write_memory() -> Iterator[str]:
    """Write the memory of all jobs anew; yields the layouts that changed."""
    for path in layout_files():
        text = path.read_text(encoding="utf-8")
        if (now := _ENTRY.sub(_written_anew, text)) != text:
            path.write_text(now, encoding="utf-8")
            yield path.stem


if __name__ == "__main__":
    for changed in _write_memory():
        print(changed)
