"""The quickstart's recipe at toy length, as a person starts it, for tests that disturb it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.launching import marked_processes

SHORT = [
    "threads=1",
    "train.schedule.warmup_steps=1",
    "data.num_documents=300",
    "train.log_interval=1",
    "train.save_interval=2",
    "model.num_layers=2",
    "rl.prompts_per_rollout=4",
    "rl.group_size=4",
    "rollout.max_response_tokens=24",
    "evaluate.num_prompts=16",
    "evaluate.samples_per_prompt=2",
    "track.wandb=offline",
]
LOCAL = ["rollout=local"]
SGLANG = ["rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16"]
STAGES = {"pretrain": ["train.steps=6"], "r1_zero": ["train.steps=3", "init.from='{base}'"]}
DIES_WITHIN_S = 5.0


def _list(lines: list[str]) -> str:
    return "[" + ",".join(f'"{line}"' for line in lines) + "]"


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that is being taken apart has no environment any more, but holds files and ports."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Recipe:
    """The quickstart with every stage made short, in a folder of its own."""

    root: Path
    engine: tuple[str, ...] = tuple(LOCAL)
    """Overrides of every stage that choose the engine."""

    @property
    def folder(self) -> Path:
        """Where the recipe's runs are."""
        return self.root / "short"

    @property
    def log(self) -> str:
        """What all its starts have printed."""
        return (self.root / "short.log").read_text()

    @property
    def command(self) -> list[str]:
        """The command line."""
        overrides = [f"pipeline.stages.{name}.overrides={_list(lines)}" for name, lines in STAGES.items()]
        common = f"pipeline.overrides={_list([*SHORT, *self.engine])}"
        return [
            *(sys.executable, "-m", "megatron_r1", "pipeline", "--config-name", "quickstart"),
            *(f"root='{self.root}'", "name=short", "platform=cpu", common, *overrides),
        ]

    @contextlib.contextmanager
    def started(self) -> Iterator[psutil.Popen]:
        """The recipe's process, the parent of all others; nothing of it is left after the block."""
        self.root.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"MEGATRON_R1_TEST": str(self.folder)}
        with (self.root / "short.log").open("a") as log:
            process = psutil.Popen(self.command, stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            for left in self.processes():
                left.kill()
            process.wait()

    def run(self, seconds: float) -> None:
        """Go through the recipe, or through what is left of it, without a disturbance."""
        with self.started() as process:
            assert process.wait(seconds) == 0, self.log

    def processes(self) -> list[psutil.Process]:
        """All living processes of the recipe, however deep, by a mark in their environment."""
        return marked_processes(str(self.folder))

    def seconds_until_gone(self, known: list[psutil.Process], since: float) -> float:
        """Seconds from `since` until the known processes and all marked ones are gone; fails when they are too many."""
        while left := [*self.processes(), *filter(lives, known)]:
            assert time.monotonic() - since < DIES_WITHIN_S, f"left behind: {left}"
            time.sleep(0.05)
        return time.monotonic() - since

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The metrics that a stage has recorded."""
        path = self.folder / stage / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def results(self) -> dict[str, Any]:
        """What the evaluation found."""
        found: dict[str, Any] = json.loads((self.folder / "evaluate" / "results.json").read_text())
        return found
