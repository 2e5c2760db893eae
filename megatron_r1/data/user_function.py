"""Functions of a user's own file, FILE.py:NAME, which the user names on the command line."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.errors import ConfigError


def load_function(location: str, key: str) -> Callable[..., Any]:
    """The function at FILE.py:NAME.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be loaded.
    """
    file, _, name = location.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(key, location, f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"user_function_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(key, location, f"the file cannot be loaded: {where(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(key, location, f"{path.name} has no function {name}")
    return function  # type: ignore[no-any-return]


def where(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the user's file where it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    message = " ".join(str(error).split())
    return f"{path.name}:{line}: {type(error).__name__}: {message}" if line else f"{type(error).__name__}: {message}"
