"""The generated worlds, by their names in `data.source`."""

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
    """The properties of a generated world that pre-training and its tokenizer need."""

    documents: Callable[[DataConfig], Iterator[str]]
    """The texts to pre-train on, without begin and end tokens."""
    largest_number: int
    """Whole numbers up to this one are tokens."""
    pieces: str = ""
    """Regular expression of further places where the tokenizer cuts this world's texts."""


WORLDS = {
    "arithmetic": World(arithmetic.documents, 199, arithmetic.PIECES),
    "assistant": World(texts.documents, 99, f"{arithmetic.PIECES}|{PIECES}"),
}


def world_of(config: DataConfig) -> World:
    """The world that the config names.

    Raises:
        ConfigError: its source is no generated world.
    """
    if config.source not in WORLDS:
        raise ConfigError("data.source", config.source, f"must be one of {', '.join(WORLDS)} here")
    return WORLDS[config.source]
