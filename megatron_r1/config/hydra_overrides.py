"""Hydra parses the overrides whose forms `overrides` does not cover, and says what is wrong."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from megatron_r1.config.schema import shown
from megatron_r1.errors import ConfigError


def parsed(line: str, name: str, text: str) -> Override:
    """An override as Hydra parses it; `name` and `text` are its key and its value in an error.

    Raises:
        ConfigError: Hydra cannot parse it.
    """
    try:
        override = OverridesParser.create().parse_override(line)
        override.is_sweep_override()
    except (HydraException, ValueError) as error:
        detail = shown(error.__cause__ or error) if isinstance(error, OverrideParseException) else shown(error)
        raise ConfigError(name, shown(text), f"must be key=value, odd characters in quotes ({detail})") from None
    return override
