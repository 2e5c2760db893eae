"""What a checkpoint holds: `tools/inspect_checkpoint.py RUN|CHECKPOINT [--tensors GLOB] [--values] [--against OTHER]`.

Reads headers only, except with --values and --against. With --against, the exit status is 1 where a bit differs,
whatever layouts wrote the two.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.checkpoint.inspect import Line, checkpoints_in, differences, shown, tensors, values
from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.checkpoint.tensor_file import TYPE_NAMES
from megatron_r1.checkpoint.tensors import read_state
from megatron_r1.errors import ExitCode, UserError

DIFFERENT = 1
WIDTH = 200
"""Columns of a listing that goes to a file."""


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=None)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return made


def overview(checkpoint: Path, found: list[Line]) -> Table:
    """A line for each kind of tensors."""
    made = table(str(checkpoint), "kind", "tensors", "numbers", "bytes", "types", "parts")
    for kind in dict.fromkeys(line.kind for line in found):
        of_kind = [line for line in found if line.kind == kind]
        made.add_row(
            kind,
            str(len(of_kind)),
            f"{sum(prod(line.entry.shape) for line in of_kind):,}",
            f"{sum(line.entry.nbytes for line in of_kind):,}",
            " ".join(sorted({TYPE_NAMES[line.entry.dtype] for line in of_kind})),
            str(sum(line.parts for line in of_kind)),
        )
    return made


def made_with(checkpoint: Path) -> Table:
    """Where the run stood, and how it was laid out."""
    metadata: dict[str, Any] = read_manifest(checkpoint).metadata
    made = table("made with", "what", "value")
    layout = {key: value for key, value in metadata.get("layout", {}).items() if value not in (1, [], None, False)}
    for what, value in {**read_state(checkpoint), "layout": layout or "one rank"}.items():
        made.add_row(what, str(value))
    return made


def listing(checkpoint: Path, found: list[Line], pattern: str, with_values: bool) -> Table:
    """A line for each tensor whose name fits."""
    more = ("smallest", "largest", "rms", "not finite") if with_values else ()
    made = table(pattern, "tensor", "kind", "shape", "type", "parts", *more)
    for line in found:
        if not fnmatch.fnmatchcase(line.entry.name, pattern):
            continue
        kind, shape = shown(line.entry).split()
        cells = [line.entry.name, line.kind, shape, kind, str(line.parts)]
        if with_values:
            numbers = values(checkpoint, line)
            cells += [
                f"{numbers.smallest:.4g}",
                f"{numbers.largest:.4g}",
                f"{numbers.root_mean_square:.4g}",
            ]
            cells.append(str(numbers.not_finite))
        made.add_row(*cells)
    return made


def compare(checkpoint: Path, other: Path, console: Console) -> ExitCode | int:
    """Say where two checkpoints differ."""
    found = list(differences(checkpoint, other))
    made = table(f"{checkpoint} against {other}", "tensor", "kind", "difference")
    for difference in found:
        made.add_row(difference.name, difference.kind, difference.what)
    console.print(made if found else f"{checkpoint} and {other}: every tensor is equal to the last bit", soft_wrap=True)
    return DIFFERENT if found else ExitCode.DONE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN|CHECKPOINT")
    parser.add_argument("--tensors", metavar="GLOB", help="list the tensors whose names fit")
    parser.add_argument("--values", action="store_true", help="read them and describe their numbers")
    parser.add_argument("--against", type=Path, metavar="RUN|CHECKPOINT", help="compare to the last bit")
    given, console = parser.parse_args(), Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        checkpoint = checkpoints_in(given.folder)[0]
        if given.against:
            return int(compare(checkpoint, checkpoints_in(given.against)[0], console))
        found = list(tensors(checkpoint))
        console.print(made_with(checkpoint), "", overview(checkpoint, found))
        if given.tensors or given.values:
            console.print("", listing(checkpoint, found, given.tensors or "*", given.values))
    except UserError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
