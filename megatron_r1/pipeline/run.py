"""Runs the stages of a recipe that are not done, each in processes of its own, several side by side where they may."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_r1.errors import ExitCode, Requeue, UserError
from megatron_r1.pipeline.compose import ComposedStage
from megatron_r1.pipeline.ranks import POLL_S, RankProcesses, Signals, forwarding_signals
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.state import INTERRUPTED, note_end, note_start, prepare_folder
from megatron_r1.runs.folder import DONE, is_done

PROGRAM = (sys.executable, "-m", "megatron_r1")
"""What runs a stage, before its arguments."""

console = Console(stderr=True, highlight=False)


StartStage = Callable[[ComposedStage, str], RankProcesses]
"""Starts the ranks of a stage, whose output has a prefix."""


def start_here(stage: ComposedStage, prefix: str) -> RankProcesses:
    """All ranks on this machine."""
    return RankProcesses([*PROGRAM, *stage.arguments], stage.ranks, prefix)


class StageFailed(UserError):
    """A stage failed; its exit code becomes the recipe's."""


@dataclass(frozen=True)
class RunningStage:
    """A stage that runs now."""

    name: str
    ranks: RankProcesses
    started: float


class RecipeRun:
    """One run of a recipe."""

    def __init__(
        self, recipe: ComposedRecipe, workers: int, after_stage: Callable[[], None], start: StartStage = start_here
    ):
        """
        Args:
            workers: stages that may run at the same time.
            after_stage: called after a stage has ended, or several, with `pipeline.json` up to date.
            start: starts a stage whose folder is ready.
        """
        self._recipe, self._workers, self._after_stage, self._start_ranks = recipe, workers, after_stage, start
        self._waiting = list(recipe.selected)
        self._running: list[RunningStage] = []
        self._failure: tuple[str, int] | None = None
        self._ended = False

    def run(self) -> None:
        """Run every selected stage that is not done.

        Signals go to the stages that run, and no further stage starts. When a stage fails, the others that run are
        ended at their next checkpoint.

        Raises:
            StageFailed: the first stage that ended with an exit code that is not 0.
            KeyboardInterrupt: the user interrupted the recipe.
        """
        with forwarding_signals() as signals:
            while self._waiting or self._running:
                if not (self._failure or signals.received):
                    self._start_ready(signals)
                elif not self._running:
                    break
                self._show_ended()  # while the next stage runs
                time.sleep(POLL_S if self._running else 0)
                for running in list(self._running):
                    if (code := running.ranks.poll()) is not None:
                        self._end(running, code, signals)
            self._show_ended()
        self._raise_failure(signals)

    def _show_ended(self) -> None:
        if self._ended:
            self._ended = False
            self._after_stage()

    def _start_ready(self, signals: Signals) -> None:
        for name in list(self._waiting):
            needs = self._recipe.needed_by(name)
            if len(self._running) == self._workers or any(need in self._waiting for need in needs):
                continue
            if any(need == running.name for running in self._running for need in needs):
                continue
            self._waiting.remove(name)
            self._start(name, signals)

    def _start(self, name: str, signals: Signals) -> None:
        stage, recipe = self._recipe.stages[name], self._recipe
        if recipe.states[name].state == "done":
            console.print(f"{self._title(name)}: done before")
            return
        prepare_folder(stage, recipe.identities[name])
        if is_done(stage.folder):
            recipe.refresh(name)
            console.print(f"{self._title(name)}: its earlier run is back")
            return
        # The identity says that it is the same run, even where its paths are others than those it began with.
        (stage.folder / "config.yaml").unlink(missing_ok=True)
        note_start(stage.folder)
        why = f" ({recipe.states[name].why})" if recipe.states[name].why else ""
        console.print(f"{self._title(name)}: {stage.verb}{why}")
        recipe.refresh(name, running=True)
        prefix = f"{name}: " if self._workers > 1 else ""
        ranks = self._start_ranks(stage, prefix)
        self._running.append(RunningStage(name, ranks, time.monotonic()))
        signals.jobs.append(ranks)

    def _end(self, running: RunningStage, code: int, signals: Signals) -> None:
        self._running.remove(running)
        signals.jobs.remove(running.ranks)
        running.ranks.close()
        seconds, name = time.monotonic() - running.started, running.name
        note_end(self._recipe.stages[name].folder, seconds, code)
        self._ended = True
        self._recipe.refresh(name)
        if code:
            self._fail(name, code)
        else:
            self._check_outputs(name)
            console.print(f"{self._title(name)}: done in {seconds:.0f} s")

    def _fail(self, name: str, code: int) -> None:
        self._failure = self._failure or (name, code)
        for other in self._running:
            other.ranks.send_signal(signal.SIGTERM)

    def _check_outputs(self, name: str) -> None:
        """Raises StageFailed where a stage has ended without an output that other stages use."""
        stage = self._recipe.stages[name]
        used_types = {output.type for output in self._recipe.outputs_used_from(name)}
        paths = [Path(stage.path_of(output).removeprefix("hf:")) for output in sorted(used_types)]
        absent = [path for path in (stage.folder / DONE, *paths) if not path.exists()]
        if absent:
            raise StageFailed(f"stage {name} ended without {', '.join(map(str, absent))}")

    def _title(self, name: str) -> str:
        names = self._recipe.selected
        return f"[{names.index(name) + 1}/{len(names)}] {name}"

    def _raise_failure(self, signals: Signals) -> None:
        """Raises what ended the recipe early, if anything did."""
        name, code = self._failure or ("", 0)
        if code == INTERRUPTED or (not code and signal.SIGINT in signals.received):
            raise KeyboardInterrupt
        if code:
            failure = StageFailed(f"stage {name} ended with exit code {code}; the same command resumes there")
            failure.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.BUG
            raise failure
        if self._waiting:
            raise Requeue("a signal stopped the recipe between two stages; the same command resumes it")
