"""Reads a recipe's folder for the report, without changing it.

A stage that did not run, or a file that a crash left torn, is missing from the page and never an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.track.record import read_metrics


@dataclass(frozen=True)
class Stage:
    """The run of one stage, any part of which may be missing."""

    name: str
    config: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    accuracy: dict[str, Any] = field(default_factory=dict)
    """Accuracy of a reward model, or of implicit rewards, on held-out examples, and of the length baselines."""

    @property
    def kind(self) -> str:
        """rl, reward_model, preference, sft, pretrain, or other; derived from the metrics in the rows."""
        keys = set().union(*self.rows[:1], *self.rows[-1:])
        known = {
            "train/score_loss": "reward_model",
            "train/chosen_reward": "preference",
            "rollout/reward": "rl",
            "train/loss_tokens": "sft",
            "train/loss": "pretrain",
        }
        return next((kind for key, kind in known.items() if key in keys), "other")


@dataclass(frozen=True)
class Recipe:
    """The contents of the page."""

    name: str
    stages: list[Stage]
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[tuple[str, int]] = field(default_factory=list)
    """Path relative to the recipe's folder, size in bytes; a checkpoint or wandb folder counts as one."""

    def of_kind(self, kind: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind == kind]


def read_recipe(folder: Path) -> Recipe:
    """Reads every stage in a recipe's folder, in the order of their starts."""
    folders = sorted((path for path in folder.iterdir() if path.is_dir()), key=_start_of) if folder.is_dir() else []
    evaluation = next((path for path in folders if (path / "results.json").is_file()), folder / "evaluate")
    results = _json(evaluation / "results.json")
    if not isinstance(results.get("models", {}), dict):
        results = {}
    return Recipe(
        name=folder.resolve().name,
        stages=[_stage(path) for path in folders if any((path / file).is_file() for file in STAGE_FILES)],
        results=results,
        samples={path.stem: _rows(path) for path in sorted(evaluation.glob("samples/*.jsonl"))},
        files=_files(folder),
    )


STAGE_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "results.json")


def _stage(path: Path) -> Stage:
    accuracy = _json(path / "accuracy.json")
    return Stage(path.name, _text(path / "config.yaml"), _json(path / "environment.json"), _steps(path), accuracy)


def _start_of(path: Path) -> tuple[float, str]:
    """Start of a stage: the time of its configuration, the first file of a run; and its name."""
    first = path / "config.yaml"
    return (first if first.is_file() else path).stat().st_mtime, path.name


def _steps(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path / "metrics.jsonl")


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(_text(path))
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in _text(path).splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _files(folder: Path) -> list[tuple[str, int]]:
    """Files of the recipe and of each stage; files in subfolders are summed up under the stage's subfolder."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            parts = path.relative_to(folder).parts
            depth = 3 if len(parts) > 3 and parts[1] == "checkpoints" else 2
            name = "/".join(parts[:depth]) + ("/" if len(parts) > depth else "")
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return list(sizes.items())
