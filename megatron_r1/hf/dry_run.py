"""What a conversion would write, without reading a tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_r1.hf.conversion import Conversion
from megatron_r1.hf.plan import hf_index, totals

_SHOWN = 20


def show_index(conversion: Conversion) -> None:
    """Print the index that would be written to standard output, and how much it is to standard error."""
    files = conversion.files()
    json.dump(hf_index(files), sys.stdout, indent=2)
    print()
    show_plan(conversion, None, [])


def show_plan(conversion: Conversion, source: Path | None, problems: list[str]) -> None:
    """Show a table: how much would be written, and what of the source is not as it must be.

    Args:
        source: folder that was looked at, if any.
        problems: what was found there.
    """
    console, all_files = Console(stderr=True, highlight=False), totals(conversion.files())
    table = Table(title=f"{source or 'a new model'} -> {conversion.target!r}", show_header=False)
    rows = [("files", all_files.files), ("tensors", all_files.tensors), ("elements", all_files.elements)]
    rows += [(f"bytes in {kind}", size) for kind, size in all_files.bytes_by_type.items()]
    for name, amount in [*rows, ("bytes", all_files.nbytes)]:
        table.add_row(name, f"{amount:,}")
    if source:
        table.add_row("not as it must be", f"{len(problems):,}")
    console.print(table)
    for problem in problems[:_SHOWN]:
        console.print(f"  {problem}", markup=False)
    if len(problems) > _SHOWN:
        console.print(f"  ... and {len(problems) - _SHOWN} more")
