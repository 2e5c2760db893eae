"""A recipe with its state: what `--list`, `pipeline.json` and the report say, and what is left to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1.config.pipeline import PipelineConfig, StageOutput
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError, FolderInUse
from megatron_r1.files import Lock, read_json, take_lock, write_whole
from megatron_r1.pipeline.compose import compose_stages
from megatron_r1.pipeline.graph import mermaid, needed_by, selected
from megatron_r1.pipeline.identity import identities_of
from megatron_r1.pipeline.paths import FileHashes
from megatron_r1.pipeline.settings import settings_of
from megatron_r1.pipeline.state import StageState, state_of
from megatron_r1.runs.folder import run_folder

RECORD = "pipeline.json"
HASHES = "file_hashes.json"
LOCK = ".lock"


class ComposedRecipe:
    """The stages of a recipe: composed, with their identities and their states, all by name and in order."""

    def __init__(self, config: RunConfig):
        """Compose all stages; nothing is written but the hashes of files.

        Raises:
            ConfigError: a stage does not compose, or there is none.
        """
        self.config: PipelineConfig = config.pipeline
        if not self.config.stages:
            raise ConfigError("pipeline.stages", "{}", "needs at least one stage: choose a recipe with pipeline=NAME")
        self.folder: Path = run_folder(config)
        self.selected = selected(self.config)
        self.stages = compose_stages(config, self.folder)
        self.identities = identities_of(self.stages, FileHashes(self.folder / HASHES))
        self.states = {name: state_of(stage, self.identities[name]) for name, stage in self.stages.items()}

    def needed_by(self, name: str) -> list[str]:
        """The stages that must be done before a stage."""
        return needed_by(self.config, name)

    def outputs_used_from(self, name: str) -> list[StageOutput]:
        """The outputs of a stage that other stages use as inputs."""
        every = [output for stage in self.stages.values() for output in stage.inputs.values()]
        return [output for output in every if output.stage == name]

    def check_selection(self) -> None:
        """Refuse `from` and `only` where a stage that they leave out is needed and not done.

        Raises:
            ConfigError: names the stage.
        """
        for name in self.selected:
            for need in self.needed_by(name):
                if need not in self.selected and self.states[need].state != "done":
                    key, value = ("only", self.config.only) if self.config.only else ("from", self.config.from_)
                    state = self.states[need]
                    reason = f"{state.state}: {state.why}" if state.why else state.state
                    raise ConfigError(f"pipeline.{key}", value, f"{name} needs {need}, which is not done ({reason})")

    def note_running(self) -> None:
        """Mark the stages that another process runs now, as its `pipeline.json` says."""
        if not (self.folder / LOCK).exists():
            return
        try:
            self.lock().close()
        except FolderInUse:
            for stage in read_json(self.folder / RECORD)["stages"]:
                if stage["state"] == "running" and stage["name"] in self.states:
                    self.states[stage["name"]] = replace(self.states[stage["name"]], state="running", why="")

    def lock(self) -> Lock:
        """Lock the recipe's folder; raises FolderInUse while another process runs the recipe."""
        return take_lock(self.folder / LOCK, "two jobs cannot run one recipe")

    def refresh(self, name: str, running: bool = False) -> None:
        """Read a stage's state again, and write it all to `pipeline.json`."""
        state = state_of(self.stages[name], self.identities[name])
        self.states[name] = StageState("running", "", state.seconds, state.started) if running else state
        self.write()

    def write(self) -> None:
        """Write `pipeline.json`; a reader sees the old file or the whole new one."""
        write_whole(self.folder / RECORD, json.dumps(self.as_record(), indent=1).encode())

    def as_record(self) -> dict[str, Any]:
        """The contents of `pipeline.json`."""
        return {
            "recipe": self.folder.name,
            "stages": [self._stage_record(name) for name in self.stages],
            "mermaid": mermaid(self.config, self.state_names()),
        }

    def state_names(self) -> dict[str, str]:
        """Name -> done, running, stale, missing or failed."""
        return {name: state.state for name, state in self.states.items()}

    def _stage_record(self, name: str) -> dict[str, Any]:
        stage, state = self.stages[name], self.states[name]
        inputs = {key: f"{output.stage}.{output.type}" for key, output in stage.inputs.items()}
        return {
            "name": name,
            "verb": stage.verb,
            "inputs": inputs,
            "needs": list(stage.needs),
            "state": state.state,
            "why": state.why,
            "identity": self.identities[name].digest,
            "seconds": state.seconds,
            "started": state.started,
            "folder": str(stage.folder),
            "settings": settings_of(stage),
        }

    def left(self) -> Sequence[str]:
        """The selected stages that are not done."""
        return [name for name in self.selected if self.states[name].state != "done"]
