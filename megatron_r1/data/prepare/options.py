"""Options of the tokeniser program."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, within
from megatron_r1.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TokeniseOptions:
    """All options on which the output depends."""

    inputs: tuple[str, ...]
    """Files to read, in this order: rows as of `row_files`, or .txt."""
    fields: tuple[str, ...] = ("text",)
    """Fields of a row that make its text, one line break between them."""
    seed: int = 0
    """Seed of every draw below."""
    fim_rate: float = 0.1
    """Share of documents that are reordered to fill in the middle (DeepSeek-V3 report, section 4.1)."""
    punctuation_split_rate: float = 0.1
    """Share of the tokens made of punctuation and line breaks that are split; the report does not give its value."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files; documents that share an n-gram with them are dropped."""
    decontaminate_fields: tuple[str, ...] = field(default=())
    """Fields of an evaluation row that make its text; empty takes `fields`."""
    ngram: int = 10
    """Words in a row that make a document contaminated (DeepSeek-R1 report)."""
    shard_bytes: int = 64 << 20
    """Bytes of input per shard. A killed worker loses the work on one shard at most."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("inputs", "", "must name at least one file")
        for name in ("inputs", "decontaminate", "fields"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(name, " ".join(values), "must not name one twice")
        if not self.fields:
            raise ConfigError("fields", "", "must name at least one field")
        at_least(self, 0, "seed")
        within(self, 0.0, 1.0, "fim_rate", "punctuation_split_rate")
        at_least(self, 2, "ngram")
        at_least(self, 1, "shard_bytes")
