"""pipeline: go through a recipe's stages; interrupted, it goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from rich.console import Console

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError, ExitCode, UserError
from megatron_r1.pipeline.graph import in_order, stage_command
from megatron_r1.stages.session import is_done, open_run_folder

console = Console(stderr=True, highlight=False)


class StageFailed(UserError):
    """A stage ended with an exit code of its own, which becomes the recipe's."""


def run(config: RunConfig) -> None:
    """Run every stage that is not done, each as a process of its own."""
    stages = config.pipeline.stages
    if not stages:
        raise ConfigError("pipeline.stages", "{}", "needs at least one stage: choose a recipe with pipeline=NAME")
    names = in_order(stages)
    folder = open_run_folder(config)
    common = [*config.pipeline.overrides, f"seed={config.seed}", f"platform={config.platform}"]
    for number, name in enumerate(names, start=1):
        title = f"[{number}/{len(names)}] {name}"
        if is_done(folder / name):
            console.print(f"{title}: done before")
            continue
        console.print(f"{title}: {stages[name].verb}")
        started = time.monotonic()
        run_stage(name, stage_command(name, stages[name], folder, common))
        console.print(f"{title}: done in {time.monotonic() - started:.0f} s")
    console.print(f"finished: {folder}")


def run_stage(name: str, arguments: list[str]) -> None:
    """One stage in a process of its own; signals reach it, and its exit code comes back.

    Raises:
        StageFailed: the stage did not end well.
    """
    process = subprocess.Popen([sys.executable, "-m", "megatron_r1", *arguments])
    # A terminal sends Ctrl-C to the stage as well, which saves and ends; a scheduler's signal is passed on.
    previous = {
        number: signal.signal(number, lambda received, _: process.send_signal(received))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    } | {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code:
        failure = StageFailed(f"stage {name} ended with exit code {code}; the same command goes on from there")
        failure.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.BUG
        raise failure
