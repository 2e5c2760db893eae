"""Fills in a job script of launch/slurm: directives of SLURM, and the variables at its top.

A script is bash as it stands, and a person can fill it in by hand. Only lines `#SBATCH --option=value` and
`variable=value` above the line `# filled in` change.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1.config.recipes import PACKAGE

DIRECTIVE = re.compile(r"#SBATCH --([\w-]+)(=.*)?")
VARIABLE = re.compile(r"([a-z_]+)=.*")
END = "# filled in"
COMPONENT = "#SBATCH hetjob"
"""Between the directives of the components of a heterogeneous job."""


def scripts_folder() -> Path:
    """The job scripts: `megatron_r1/_slurm` of an installed package, `launch/slurm` of a checkout."""
    installed = PACKAGE / "_slurm"
    return installed if installed.is_dir() else PACKAGE.parent / "launch" / "slurm"


def fill_in(
    script: str,
    directives: Mapping[str, str | None],
    variables: Mapping[str, str | Sequence[str]],
    further: Sequence[str] = (),
    second: Mapping[str, str | None] | None = None,
) -> str:
    """The script with these values.

    Args:
        script: text of a file of launch/slurm.
        directives: option of sbatch -> its value, empty for an option without one; None leaves the option out.
        variables: name -> text, or the items of an array; each must be one of the script's.
        further: further options of sbatch, such as ``--constraint=h100``.
        second: as `directives`, of the second component of a heterogeneous job.

    Raises:
        KeyError: the script has no such variable.
    """
    head, end, rest = script.partition(f"{END}\n")
    first, between, last = head.partition(f"{COMPONENT}\n")
    first = _with_directives(first, directives, further)
    last = _with_directives(last, second or {}, further) if between else last
    return f"{_with_variables(f'{first}{between}{last}', variables)}{end}{rest}"


def _with_directives(text: str, directives: Mapping[str, str | None], further: Sequence[str]) -> str:
    """The lines of one component's directives with these values; options that have no line get one at the end."""
    lines, added = [], dict(directives)
    for line in text.splitlines():
        found = DIRECTIVE.fullmatch(line)
        lines += _directive(found[1], added.pop(found[1], (found[2] or "")[1:])) if found else [line]
    last = max(number for number, line in enumerate(lines) if DIRECTIVE.fullmatch(line))
    missing = [line for name, value in added.items() for line in _directive(name, value)]
    lines[last + 1 : last + 1] = [*missing, *(f"#SBATCH {option}" for option in further)]
    return "".join(f"{line}\n" for line in lines)


def _directive(name: str, value: str | None) -> list[str]:
    return [] if value is None else [f"#SBATCH --{name}={value}".removesuffix("=")]


def _with_variables(text: str, variables: Mapping[str, str | Sequence[str]]) -> str:
    lines, unused = [], dict(variables)
    for line in text.splitlines():
        found = VARIABLE.fullmatch(line)
        named = found is not None and found[1] in unused
        lines += [f"{found[1]}={_quoted(unused.pop(found[1]))}" if found and named else line]
    if unused:
        raise KeyError(f"the script has no variable {', '.join(unused)}")
    return "".join(f"{line}\n" for line in lines)


def _quoted(value: str | Sequence[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
