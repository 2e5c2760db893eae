"""The graph of a recipe: order of the stages, selections of them, and its picture as Mermaid and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.errors import ConfigError


def needed_by(pipeline: PipelineConfig, name: str) -> list[str]:
    """The stages that must be done before stage `name`: those of its inputs, and those that it names in `needs`."""
    stage = pipeline.stages[name]
    return list(
        dict.fromkeys([*(pipeline.output_of(written).stage for written in stage.inputs.values()), *stage.needs])
    )


def in_order(pipeline: PipelineConfig) -> list[str]:
    """Names of all stages, each after those that it needs; otherwise in the order of the recipe.

    Raises:
        ConfigError: the stages need one another in a circle.
    """
    needs = {name: needed_by(pipeline, name) for name in pipeline.stages}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise ConfigError("pipeline.stages", circle, "must not need one another in a circle") from None
    return _with_all(needs, pipeline.stages)


def selected(pipeline: PipelineConfig) -> list[str]:
    """The stages that `from`, `until` and `only` leave, in order."""
    names = in_order(pipeline)
    if pipeline.only:
        return [pipeline.only]
    needs = {name: needed_by(pipeline, name) for name in names}
    if pipeline.until:
        before = set(_with_all(needs, [pipeline.until]))
        names = [name for name in names if name in before]
    if pipeline.from_:
        names = [name for name in names if pipeline.from_ in _with_all(needs, [name])]
    if not names:
        allowed = f"must be a stage that until={pipeline.until} depends on"
        raise ConfigError("pipeline.from", pipeline.from_, allowed)
    return names


def with_all_needed(pipeline: PipelineConfig, names: Iterable[str]) -> list[str]:
    """These stages and all that they need, each after those that it needs."""
    return _with_all({name: needed_by(pipeline, name) for name in pipeline.stages}, names)


def _with_all(needs: Mapping[str, Iterable[str]], names: Iterable[str]) -> list[str]:
    """The names and all that they need, each after what it needs."""
    found: dict[str, None] = {}
    for name in names:
        if name not in found:
            found |= dict.fromkeys(_with_all(needs, needs[name])) | {name: None}
    return list(found)


def mermaid(pipeline: PipelineConfig, states: Mapping[str, str]) -> str:
    """The graph as a Mermaid flowchart: edges carry the type of what a stage takes, nodes their state as a class."""
    lines = ["flowchart TD"]
    for name in in_order(pipeline):
        stage = pipeline.stages[name]
        lines.append(f'  {name}["{name}<br/>{stage.verb}"]:::{states[name]}')
        edges = dict.fromkeys(
            (output.stage, output.type) for output in (pipeline.output_of(written) for written in stage.inputs.values())
        )
        lines += [f"  {source} -->|{type}| {name}" for source, type in edges]
        lines += [f"  {need} -.-> {name}" for need in stage.needs]
    colours = {"done": "#d4edda", "running": "#cce5ff", "stale": "#fff3cd", "missing": "#f4f4f4", "failed": "#f8d7da"}
    return "\n".join([*lines, *(f"  classDef {state} fill:{colour}" for state, colour in colours.items())])


def as_text(pipeline: PipelineConfig, states: Mapping[str, str]) -> str:
    """The graph as lines of text: a stage, its verb and state, and below it what it takes from which stage."""
    lines = []
    for name in in_order(pipeline):
        stage = pipeline.stages[name]
        lines.append(f"{name} ({stage.verb}): {states[name]}")
        for key, written in stage.inputs.items():
            output = pipeline.output_of(written)
            lines.append(f"  <- {output.stage}.{output.type} as {key}")
        lines += [f"  <- after {need}" for need in stage.needs]
    return "\n".join(lines)
