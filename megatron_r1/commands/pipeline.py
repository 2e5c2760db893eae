"""pipeline: runs the stages of a recipe; an interrupted recipe resumes where it stopped."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

from rich.console import Console

from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError, ExitCode, UserError
from megatron_r1.pipeline.graph import in_order, stage_command
from megatron_r1.pipeline.ranks import run_ranks
from megatron_r1.runs.folder import is_done, open_run_folder

INTERRUPTED = 130
"""Exit code of a stage that Ctrl-C ended at once."""

console = Console(stderr=True, highlight=False)


class StageFailed(UserError):
    """A stage failed; its exit code becomes the recipe's."""


def run(config: RunConfig) -> None:
    """Run every stage that is not done, each in processes of its own."""
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
        arguments = stage_command(name, stages[name], folder, common)
        if stages[name].verb in TRAINING_VERBS:
            degrees = [f"parallel.{degree}={size}" for degree, size in asdict(config.parallel).items()]
            run_stage(name, [*arguments, *degrees], config.pipeline.ranks or config.parallel.fewest_ranks())
        else:
            run_stage(name, arguments)
        console.print(f"{title}: done in {time.monotonic() - started:.0f} s")
    console.print(f"finished: {folder}")


def run_stage(name: str, arguments: list[str], ranks: int = 1) -> None:
    """Run one stage in processes of its own, to which signals are forwarded.

    Raises:
        StageFailed: the stage ended with an exit code that is not 0.
        KeyboardInterrupt: the user interrupted it.
    """
    code = run_ranks([sys.executable, "-m", "megatron_r1", *arguments], ranks)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        failure = StageFailed(f"stage {name} ended with exit code {code}; the same command resumes there")
        failure.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.BUG
        raise failure
