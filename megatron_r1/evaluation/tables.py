"""Results of an evaluation as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Any]) -> None:
    """Print the results as tables."""
    models: Mapping[str, Any] = results["models"]
    title = f"{results['prompts']} held-out prompts, {results['samples']} samples each, 95 % intervals"
    _print_table(
        title,
        ("model", "mode"),
        {(name, mode): result[mode] for name, result in models.items() for mode in ("greedy", "sampled")},
        "{mean:.3f} [{low:.3f}, {high:.3f}]",
    )
    by_k = {
        (name, f"{kind}, {metric}"): values
        for name, result in models.items()
        for kind, found in (("pass@k", result["pass_at_k"]), ("cons@k", {"any format": result["cons_at_k"]}))
        for metric, values in found.items()
        if len(values) > 1
    }
    _print_table("k =", ("model", "of the samples"), by_k, "{mean:.3f} [{low:.3f}, {high:.3f}]")
    written = {(name, "sampled"): result["behaviour"]["sampled"] for name, result in models.items()}
    _print_table("behaviour", ("model", "mode"), written, "{mean:.4g} [{low:.4g}, {high:.4g}]")


def _print_table(
    title: str, key_columns: tuple[str, str], rows: Mapping[tuple[str, str], Mapping[str, Any]], cell: str
) -> None:
    """One table; columns are the names in the first row."""
    if not rows:
        return
    table = Table(title=title)
    columns = list(next(iter(rows.values())))
    for column in (*key_columns, *(name.replace("_", " ") for name in columns)):
        table.add_column(column)
    for key, values in rows.items():
        table.add_row(*key, *(cell.format(**values[column]) for column in columns))
    Console().print(table)
