"""Prints a recipe: the state of its stages, its graph, its table of settings, or the result of a dry run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.pipeline.graph import as_text, mermaid
from megatron_r1.pipeline.identity import missing_files
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.settings import COLUMNS, settings_of


def show(recipe: ComposedRecipe, what: str) -> None:
    """Print the list, the graph or the table of a recipe on stdout."""
    {"list": show_list, "graph": show_graph, "table": show_table}[what](recipe)


def show_list(recipe: ComposedRecipe) -> None:
    """One line for each stage: done, stale or missing, and why."""
    rows = [("stage", "verb", "state", "seconds", "why")]
    for name, stage in recipe.stages.items():
        state = recipe.states[name]
        why = [*(["not selected"] if name not in recipe.selected else []), *([state.why] if state.why else [])]
        rows.append((name, stage.verb, state.state, f"{state.seconds:.0f}" if state.seconds else "", "; ".join(why)))
    print(aligned(rows))


def show_graph(recipe: ComposedRecipe) -> None:
    """The graph as text, then as Mermaid."""
    states = recipe.state_names()
    print(f"{as_text(recipe.config, states)}\n\n```mermaid\n{mermaid(recipe.config, states)}\n```")


def show_table(recipe: ComposedRecipe) -> None:
    """The main settings of every stage, from its composed configuration; columns that no stage fills are left out."""
    settings = {name: settings_of(stage) for name, stage in recipe.stages.items()}
    columns = [column for column in COLUMNS if any(row[column] for row in settings.values())]
    print(aligned([("stage", *columns), *((name, *(row[key] for key in columns)) for name, row in settings.items())]))


def show_dry_run(recipe: ComposedRecipe) -> None:
    """What each selected stage would take and make; files that are not there yet are named."""
    for number, name in enumerate(recipe.selected, start=1):
        stage = recipe.stages[name]
        ranks = f", {stage.ranks} ranks" if stage.ranks > 1 else ""
        print(f"[{number}/{len(recipe.selected)}] {name}: {stage.verb}{ranks}, {recipe.states[name].state}")
        for key, output in stage.inputs.items():
            print(f"    takes {output.stage}.{output.type} as {key}: {stage.paths[key]}")
        for path in missing_files(stage):
            print(f"    needs {path}, which is not there yet")
        for type in sorted({output.type for output in recipe.outputs_used_from(name)}):
            print(f"    makes {type}: {stage.path_of(type)}")
    print(f"{len(recipe.selected)} stages compose; {len(recipe.left())} are left to run")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, each as wide as its widest cell; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *others = rows
    lines = [head, ["-" * width for width in widths], *others]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
