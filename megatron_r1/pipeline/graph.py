"""Stages as a graph: their order, and the command line of each."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from megatron_r1.config.keys import only_read
from megatron_r1.config.pipeline import StageConfig
from megatron_r1.errors import ConfigError


def in_order(stages: Mapping[str, StageConfig]) -> list[str]:
    """Names of the stages, each after those that it needs; otherwise in the order of the recipe.

    Raises:
        ConfigError: the needs of the stages form a circle.
    """
    sorter = TopologicalSorter({name: stage.needs for name, stage in stages.items()})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise ConfigError("pipeline.stages", circle, "must not need one another in a circle") from None


def stage_command(name: str, stage: StageConfig, folder: Path, common: list[str]) -> list[str]:
    """Arguments of the command line that runs one stage.

    ``{NAME}`` in an override stands for the run directory of stage NAME. The user's overrides for all stages come last
    and therefore take precedence.

    Args:
        name: of the stage, and of its run.
        folder: of the recipe, with the stages' runs.
        common: overrides for every stage; each stage gets those that its verb reads.
    """
    config = ["--config-name", stage.config] if stage.config else []
    places = [f"root='{folder}'", f"name={name}"]
    overrides = [_filled(line, folder) for line in stage.overrides]
    return [stage.verb, *config, *places, *overrides, *only_read(stage.verb, common)]


def _filled(line: str, folder: Path) -> str:
    start, end = line.find("{"), line.find("}")
    if start < 0 or end < start:
        return line
    return line[:start] + str(folder / line[start + 1 : end]) + _filled(line[end + 1 :], folder)
