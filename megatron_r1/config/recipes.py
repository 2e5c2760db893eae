"""Where the YAML files are: recipes at the top of a folder, groups of options below it."""

from __future__ import annotations

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
    """Group -> its options, as in `model=tiny`."""
    folders = sorted(path for path in configs_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
