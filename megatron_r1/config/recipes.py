"""Where the YAML files are: recipes at the top of a folder, groups of options below it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def configs_folder() -> Path:
    """The shipped YAML files: `megatron_r1/_configs` of an installed package, `configs/` of a checkout."""
    installed = PACKAGE / "_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def recipes() -> list[str]:
    """Names for --config-name; `_base`, which they share, is no recipe."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml") if not path.stem.startswith("_"))


def groups() -> dict[str, list[str]]:
    """Group -> its options, as in `model=tiny`; a folder without YAML files is no group."""
    with os.scandir(configs_folder()) as entries:
        folders = sorted((entry.name, entry.path, entry.stat().st_mtime_ns) for entry in entries if entry.is_dir())
    options = {name: _stems(path, changed) for name, path, changed in folders}
    return {name: found for name, found in options.items() if found}


def prompt_styles() -> dict[str, Path]:
    """Name -> file of the texts that `sample.prompt_style` may name."""
    return {path.stem: path for path in sorted((configs_folder() / "prompt_style").glob("*.txt"))}


@cache
def _stems(folder: str, _: int) -> list[str]:
    """Names of the YAML files in a folder, read again when the folder has changed."""
    return sorted(path.stem for path in Path(folder).glob("*.yaml"))
