"""Which files of a path hold its rows: the file itself, or one split of a Hugging Face dataset's folder.

A folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or a dataset's repository. Of a repository
one configuration is read, never several: the one that its README calls default, or `subset`. Without a README that
lists configurations, the files of a split are `SPLIT.*`, `SPLIT-*.*`, `SPLIT_0.*` or those in a folder `SPLIT`. What
`datasets` would read otherwise is refused, never read in part or twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from fsspec.utils import glob_translate

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.row_files import FORMATS, is_row_file
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.files import read_json, read_text

OTHER_NAMES = {
    "train": ("training",),
    "validation": ("valid", "dev", "val"),
    "test": ("testing", "eval", "evaluation"),
}
"""Further names by which files and folders call a split, as for `datasets`."""
NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
OTHER_FORMATS = (".tsv", ".zst", ".zip", ".bz2", ".xz", ".gz")
"""Formats that `datasets` reads and this package does not."""
_KNOWN = {name for split, others in OTHER_NAMES.items() for name in (split, *others)}
_ANY_SPLIT = re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join(sorted(_KNOWN))})(?=[-._ 0-9/])")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(?!\d)")


@dataclass(frozen=True, slots=True)
class RowSource:
    """A file, or one split of a folder."""

    path: Path
    split: str = "train"
    subset: str = ""
    """Configuration of the folder; empty takes its default one."""
    path_key: str = "path"
    """Configuration key of each, for errors."""
    split_key: str = "split"
    subset_key: str = "subset"

    @classmethod
    def of(cls, section: ConversationsConfig | PromptsConfig, key: str) -> RowSource:
        """The rows that a section of the configuration names; `key` is the section's own."""
        keys = (f"{key}.{name}" for name in ("path", "split", "subset"))
        return cls(Path(section.path), section.split, section.subset, *keys)

    def files(self) -> list[Path]:
        """The files that hold the rows, in order.

        Raises:
            ConfigError: the path, or the split or the configuration of a folder, names no rows.
            DataError: a folder is damaged.
        """
        if not self.path.is_dir():
            return self._file()
        if (self.path / "dataset_dict.json").is_file():
            splits = read_json(self.path / "dataset_dict.json").get("splits", [])
            self._check_split(splits)
            return self._saved(self.path / PurePosixPath(self.split).name)
        if (self.path / "state.json").is_file():
            return self._saved(self.path)
        if configurations := _configurations(self.path):
            files = self._of_configuration(configurations)
        else:
            files = self._of_names(self.path, self.subset)
        return _checked(self.path, files)

    def _file(self) -> list[Path]:
        if not is_row_file(self.path):
            raise ConfigError(self.path_key, self.path, f"must be a file ({FORMATS}) or a dataset's folder")
        if not self.path.is_file():
            raise ConfigError(self.path_key, self.path, "no such file")
        return [self.path]

    def _check_split(self, splits: Iterable[str]) -> None:
        if self.split not in (names := list(map(str, splits))):
            raise ConfigError(self.split_key, self.split, f"must be one of {', '.join(names)}")

    def _saved(self, folder: Path) -> list[Path]:
        """The files of a saved `Dataset`."""
        if self.subset:
            raise ConfigError(self.subset_key, self.subset, "must be empty: a saved dataset has no configurations")
        state = read_json(folder / "state.json")
        # A split may be saved on its own, and as part of one: train[:10%].
        if (saved := state.get("_split")) and self.split not in (saved, re.split(r"\W", saved)[0]):
            raise ConfigError(self.split_key, self.split, f"must be {saved}, which is what {folder} holds")
        if not saved and folder == self.path and self.split != "train":
            raise ConfigError(self.split_key, self.split, f"must be train: {folder} was saved without splits")
        files = [folder / PurePosixPath(str(entry.get("filename"))).name for entry in state.get("_data_files", [])]
        if not files or not all(file.is_file() for file in files):
            raise DataError(f"{folder}: not all the files that state.json names are there")
        return files

    def _of_configuration(self, configurations: Mapping[str, Mapping[str, Any]]) -> list[Path]:
        """The files of a configuration that the README lists."""
        name = self.subset or self._default(configurations)
        if name not in configurations:
            raise ConfigError(self.subset_key, self.subset, f"must be one of {', '.join(configurations)}")
        configuration = configurations[name]
        folder = self.path / str(configuration.get("data_dir") or "")
        if (data_files := configuration.get("data_files")) is None:
            return self._of_names(folder, "")
        patterns = _patterns(self.path, data_files)
        self._check_split(patterns)
        return _matching(folder, patterns[self.split])

    def _default(self, configurations: Mapping[str, Mapping[str, Any]]) -> str:
        default = [name for name, one in configurations.items() if one.get("default") or name == "default"]
        if len(names := default or list(configurations)) > 1:
            allowed = f"must be one of {', '.join(names)}, the configurations of {self.path}"
            raise ConfigError(self.subset_key, self.subset, allowed)
        return names[0]

    def _of_names(self, folder: Path, subset: str) -> list[Path]:
        """The files of the split by their names, below one folder."""
        below = _files_below(folder)
        found = self._named(below, _names_of(self.split))
        if not found and self.split == "train" and not any(map(_ANY_SPLIT.search, below)):
            # As for `datasets`, files of which none names a split are training data.
            found = [(PurePosixPath(name).parent.as_posix(), name) for name in below]
        if not found:
            there = ", ".join(below[:5]) or "no such file"
            allowed = f"must hold a saved dataset, or files ({FORMATS}) named {self.split} or {self.split}-*; it holds "
            raise ConfigError(self.path_key, self.path, f"{allowed}{there}")
        roots = sorted({root for root, _ in found})
        if subset not in roots and (subset or len(roots) > 1):
            allowed = f"must be one of {', '.join(roots)}, the folders that hold the split {self.split}"
            raise ConfigError(self.subset_key, subset, allowed)
        return [folder / name for root, name in found if root == (subset or roots[0])]

    def _named(self, below: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
        """(folder of the configuration, file) of each file whose name, or whose folder's, is one of `names`."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            if files := [(root, file) for file in below if (root := _root_of_split(file, name)) is not None]:
                found[name] = files
        if len(found) > 1 and self.split not in found:
            raise ConfigError(self.split_key, self.split, f"must be one of {', '.join(found)}: files have these names")
        return found.get(self.split) or next(iter(found.values()), [])


def _names_of(split: str) -> tuple[str, ...]:
    """What files may call a split, the name itself first."""
    for name, others in OTHER_NAMES.items():
        if split in (name, *others):
            return tuple(dict.fromkeys([split, name, *others]))
    return (split,)


def _root_of_split(file: str, split: str) -> str | None:
    """The folder above a split's files or folder; None for a file of another split."""
    path = PurePosixPath(file)
    for level, folder in enumerate(path.parts[:-1]):
        if folder == split:
            return "/".join(path.parts[:level]) or "."
        if folder in _KNOWN:
            return None
    stem = path.name.removesuffix(".gz")
    stem = stem.removesuffix(PurePosixPath(stem).suffix)
    named = re.fullmatch(rf"{re.escape(split)}(-.*|[._]?\d+)?", stem)
    return path.parent.as_posix() if named else None


def _files_below(folder: Path) -> list[str]:
    """All files that could hold rows, as paths from `folder`, in order; none that is hidden, none twice."""
    found, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__")) and os.path.realpath(os.path.join(parent, name)) not in visited
        ]
        found += [Path(parent, name) for name in names if not name.startswith(".") and name not in NO_ROWS]
    paths = (file.relative_to(folder).as_posix() for file in found if is_row_file(file) or file.suffix in OTHER_FORMATS)
    return sorted(paths)


def _checked(source: Path, files: Sequence[Path]) -> list[Path]:
    """The files of one split, each once; refuses several formats, formats that cannot be read, and missing shards."""
    once: dict[str, Path] = {}
    for file in files:
        once.setdefault(os.path.realpath(file), file)
    files = list(once.values())
    formats = sorted({"".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in files})
    if len(formats) > 1:
        raise DataError(f"{source}: holds the split as {' and as '.join(formats)}; name one file, or remove the others")
    if unread := [file for file in files if not is_row_file(file)]:
        raise DataError(f"{unread[0]}: must be one of {FORMATS}")
    shards: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if shard := _SHARD.match(file.name):
            shards.setdefault((file.parent, shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (folder, name, total), there in shards.items():
        if missing := set(range(total)) - there:
            raise DataError(f"{folder}: {name}-{min(missing):05}-of-{total:05} is missing")
    return files


def _configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that the README of a dataset's repository lists, by name; none where it lists none."""
    readme = folder / "README.md"
    lines = read_text(readme).splitlines() if readme.is_file() else []
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    try:
        card = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
        return {str(one["config_name"]): one for one in (card or {}).get("configs") or ()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{readme}: its configs cannot be read ({' '.join(str(error).split())})") from error


def _patterns(folder: Path, data_files: Any) -> dict[str, list[str]]:
    """Split -> patterns of its files, from the `data_files` of a README."""

    def listed(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else list(map(str, value))

    try:
        if isinstance(data_files, list) and any(isinstance(entry, dict) for entry in data_files):
            return {str(entry["split"]): listed(entry["path"]) for entry in data_files}
        if isinstance(data_files, dict):
            return {str(split): listed(value) for split, value in data_files.items()}
        return {"train": listed(data_files)}
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder}/README.md: its data_files cannot be read ({error})") from error


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    below, found = _files_below(folder), []
    for pattern in patterns:
        try:
            matches = re.compile(glob_translate(PurePosixPath(pattern).as_posix())).match
        except ValueError as error:
            raise DataError(f"{folder}/README.md: {pattern}: is no pattern of files ({error})") from error
        if not (files := [folder / name for name in below if matches(name)]):
            raise DataError(f"{folder}: README.md names {pattern}, and there is no such file of rows")
        found += files
    return found
