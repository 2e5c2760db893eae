"""How far a reader has to walk: a prompt from its file to the gradient, a weight from the optimizer to the server.

    python tools/walks.py

Each walk is a list of functions in the order of a run, `module:Qualified.name`. The program reads the sources and counts
what a reader opens: files, functions, their lines, and how often the walk comes back to a file that it had left. A step
counts only where some function earlier in the walk really mentions it, so that a list that no longer is the code fails.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_r1"


@dataclass(frozen=True)
class Figures:
    """What a walk costs its reader."""

    files: int
    file_lines: int
    functions: int
    function_lines: int
    returns: int
    """How often the walk comes back to a file that it had left."""


@dataclass(frozen=True)
class Stop:
    """One function of a walk."""

    file: Path
    name: str
    """Its own name; of a class that is called, the class's."""
    lines: int
    mentions: frozenset[str]
    """Every name and attribute in its body."""


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _find(node: ast.AST, path: list[str]) -> ast.AST | None:
    """The definition at `path` below `node`, nested functions included."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == path[0]:
            if len(path) == 1:
                return child
            if (found := _find(child, path[1:])) is not None:
                return found
    return None


def _stop(place: str) -> Stop:
    """Raises LookupError: there is no such module or function."""
    module, _, qualified = place.partition(":")
    file = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    names = qualified.split(".")
    definition = _find(_tree(file), names) if file.is_file() else None
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        raise LookupError(f"{place} does not exist")
    mentions = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    mentions |= {node.attr for node in ast.walk(definition) if isinstance(node, ast.Attribute)}
    # A method that the language calls is mentioned by its class.
    own = names[-2] if names[-1] in ("__call__", "__init__", "__enter__", "__post_init__") else names[-1]
    return Stop(file, own, (definition.end_lineno or 0) - definition.lineno + 1, frozenset(mentions))


def walked(places: list[str]) -> Figures:
    """Counts of a walk.

    Args:
        places: `module:Qualified.name` each. A trailing ` via NAME` says by which name an earlier function mentions it, where
            that is another than its own: a hook, a strategy, a method of the standard library.

    Raises:
        LookupError: a function does not exist, or no function before it mentions it.
    """
    stops: list[Stop] = []
    mentioned: set[str] = set()
    for place in places:
        written, _, via = place.partition(" via ")
        stop = _stop(written)
        if stops and (via or stop.name) not in mentioned:
            raise LookupError(f"nothing before {written} in the walk mentions {via or stop.name}")
        mentioned |= stop.mentions
        stops.append(stop)
    functions = dict.fromkeys(stops)
    files = dict.fromkeys(stop.file for stop in stops)
    return Figures(
        files=len(files),
        file_lines=sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        functions=len(functions),
        function_lines=sum(stop.lines for stop in functions),
        returns=sum(1 for _ in _returns([stop.file for stop in stops])),
    )


def _returns(files: list[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for before, file in zip([None, *files], files, strict=False):
        if file != before and file in seen:
            yield file
        seen.add(file)


PROMPT: list[str] = []
"""A prompt from its file to the gradient: SGLang, group-relative advantages, KL penalty in the loss."""
WEIGHT: list[str] = []
"""A weight from the optimizer to an SGLang server, over a process group."""
WALKS = {"a prompt, from file to gradient": PROMPT, "a weight, from optimizer to server": WEIGHT}


def main() -> int:
    for title, places in WALKS.items():
        found = walked(places)
        print(
            f"{title}: {found.files} files ({found.file_lines:,} lines), {found.functions} functions "
            f"({found.function_lines:,} lines), {found.returns} returns to a file already left"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
