"""Reads a recipe's folder for the report, without changing it.

A stage that did not run, or a file that a crash left torn, is missing from the page and never an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.config.pipeline import REPLACED
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
    folder: Path = Path()
    stamp: tuple[int, int] = (0, 0)
    """Time and size of the metrics' file, so that what was drawn of them need not be drawn again."""

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
class EvaluationRun:
    """One run of `evaluate`."""

    name: str
    """Of its folder."""
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    """Rows of responses by model."""

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Name -> results of a model."""
        found = self.results.get("models")
        return {name: model for name, model in found.items() if isinstance(model, dict)} if found else {}


@dataclass(frozen=True)
class Recipe:
    """The contents of the page."""

    name: str
    stages: list[Stage]
    evaluations: list[EvaluationRun]
    pipeline: list[dict[str, Any]] = field(default_factory=list)
    """What `pipeline.json` says of each stage, in the order of the recipe."""
    sheets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> its data sheet."""
    files: list[tuple[str, int]] = field(default_factory=list)
    """Path relative to the recipe's folder, size in bytes; a checkpoint or wandb folder counts as one."""

    @property
    def comparison(self) -> EvaluationRun:
        """The evaluation that compares models: the first of several models, or else the first."""
        several = (each for each in self.evaluations if len(each.models) > 1)
        return next(several, next(iter(self.evaluations), EvaluationRun("", {}, {})))

    def of_kind(self, kind: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind == kind]


def read_recipe(folder: Path) -> Recipe:
    """Reads every stage in a recipe's folder, in the order of their starts."""
    paths = (path for path in folder.iterdir() if path.is_dir() and path.name != REPLACED) if folder.is_dir() else ()
    folders = sorted(paths, key=_start_of)
    pipeline = _json(folder / "pipeline.json").get("stages")
    return Recipe(
        name=folder.resolve().name,
        stages=[read_stage(path) for path in folders if any((path / file).is_file() for file in STAGE_FILES)],
        evaluations=[_evaluation(path) for path in folders if (path / RESULTS).is_file()],
        pipeline=[stage for stage in pipeline if isinstance(stage, dict)] if isinstance(pipeline, list) else [],
        sheets={path.name: sheet for path in folders if (sheet := _json(path / "sheet.json"))},
        files=_files(folder),
    )


RESULTS = "results.json"
STAGE_FILES = ("config.yaml", "environment.json", "metrics.jsonl", RESULTS)


def read_stage(path: Path) -> Stage:
    """The run in one folder."""
    metrics = path / "metrics.jsonl"
    stat = metrics.stat() if metrics.is_file() else None
    return Stage(
        name=path.name,
        config=_text(path / "config.yaml"),
        environment=_json(path / "environment.json"),
        rows=read_metrics(metrics),
        accuracy=_json(path / "accuracy.json"),
        folder=path,
        stamp=(stat.st_mtime_ns, stat.st_size) if stat else (0, 0),
    )


def _evaluation(path: Path) -> EvaluationRun:
    results = _json(path / RESULTS)
    if not isinstance(results.get("models", {}), dict):
        results = {}
    samples = {file.stem: _rows(file) for file in sorted(path.glob("samples/*.jsonl"))}
    return EvaluationRun(path.name, results, samples)


def _start_of(path: Path) -> tuple[float, str]:
    """Start of a stage: the time of its configuration, the first file of a run; and its name."""
    first = path / "config.yaml"
    return (first if first.is_file() else path).stat().st_mtime, path.name


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
