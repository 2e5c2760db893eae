"""The checks that sections' `__post_init__` are written with."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any

from megatron_r1.errors import ConfigError


def at_least(section: object, low: float, *names: str) -> None:
    """Refuse any of the named fields that is below `low`."""
    for name in names:
        value = getattr(section, name)
        if not value >= low:
            raise ConfigError(name, value, f"must be at least {low}")


def within(section: object, low: float, high: float, *names: str) -> None:
    """Refuse any of the named fields outside the closed interval [low, high]."""
    for name in names:
        value = getattr(section, name)
        if not low <= value <= high:
            raise ConfigError(name, value, f"must lie between {low} and {high}")


def one_of(section: object, name: str, allowed: Iterable[str]) -> None:
    """Refuse the named field unless it is one of `allowed`."""
    value = getattr(section, name)
    if value not in (choices := tuple(allowed)):
        allowed = f"must be one of {', '.join(filter(None, choices))}{', or empty' * ('' in choices)}"
        raise ConfigError(name, value, allowed)


def iso_date(section: object, name: str) -> None:
    """Refuse the named field unless it is empty or a day, YYYY-MM-DD."""
    if value := getattr(section, name):
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            raise ConfigError(name, value, "must be a day, YYYY-MM-DD, or empty") from None


def check_files(section: Any) -> None:
    """Refuse files `train_file` and `eval_file` unless `source` is file; then both are needed."""
    for name in ("train_file", "eval_file"):
        if (section.source == "file") != bool(value := getattr(section, name)):
            allowed = (
                "must name a file or the folder of a dataset"
                if section.source == "file"
                else "must be empty: source is assistant"
            )
            raise ConfigError(name, value, allowed)


def is_function_path(text: str) -> bool:
    """Whether the text has the form FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()
