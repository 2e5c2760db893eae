"""The generated worlds, by the name that `data.source` gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic import arithmetic
from megatron_r1.data.synthetic.assistant import texts
from megatron_r1.data.synthetic.assistant.lexicon import PIECES
from megatron_r1.errors import ConfigError


@dataclass(frozen=True)
class World:
    """What pre-training and a tokenizer need of a generated world."""

    documents: Callable[[DataConfig], Iterator[str]]
    """The texts to pre-train on, without begin and end tokens."""
    largest_number: int
    """Whole numbers up to this one are tokens."""
    pieces: str = ""
    """Where a tokenizer cuts the world's own texts, beside numbers and markers; a regular expression."""


WORLDS = {
    "arithmetic": World(arithmetic.documents, 199),
    "assistant": World(texts.documents, 99, PIECES),
}


def world_of(config: DataConfig) -> World:
    """The world that the config names.

    Raises:
        ConfigError: its source is no generated world.
    """
    if config.source not in WORLDS:
        raise ConfigError("data.source", config.source, f"must be one of {', '.join(WORLDS)} here")
    return WORLDS[config.source]
