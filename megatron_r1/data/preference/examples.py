"""What reward models learn from: judged responses, in pairs or one by one, generated or from files, as tokens.

A row of tokens is a prompt, what is read of a response, and the judge's reasoning where it is trained, closed by the
end token. That token is the one whose hidden state is scored: it alone has seen the whole row, and it is the same one
in every row, so a score cannot hang on which word happens to come last.

Pairs that a policy learns from without a reward model become rows in `data.answers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_r1.data.preference_items import Item, Judged
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One judged response as tokens."""

    tokens: list[int]
    """The last one is the end token, whose hidden state is scored."""
    judged: int
    """Tokens before those that are learned, a judge's reasoning or an answer; all of them where nothing is."""


@dataclass(frozen=True, slots=True)
class Example:
    """An item as tokens."""

    rows: tuple[Row, ...]
    """Of a pair, the better one first."""
    safe: bool

    @property
    def length(self) -> int:
        """Tokens of its longest row."""
        return max(len(row.tokens) for row in self.rows)


class Encodes(Protocol):
    """Turns judged responses into tokens."""

    tokenizer: Tokenizer
    reasoning: bool
    """Whether judgements are learned."""

    def example(self, item: Item) -> Example: ...


class Encoder:
    """Turns judged responses into rows as a reward model reads them.

    Args:
        prompt: question -> the text that a model reads before it answers.
        part: response -> what of it is judged: its summary, or all of it.
        reasoning: whether the judge's reasoning follows, and is learned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Callable[[str], str], part: Callable[[str], str], reasoning: bool):
        self.tokenizer, self.reasoning = tokenizer, reasoning
        self._prompt, self._part = prompt, part

    def unjudged(self, question: str, response: str) -> list[int]:
        """Prompt and what is read of the response, before any judgement; no end token."""
        begin = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        # Apart, so that the prompt's tokens are those that the policy saw.
        prompt, part = self.tokenizer.encode_batch([self._prompt(question), self._part(response)])
        return [*begin, *prompt, *part]

    def row(self, judged: Judged) -> Row:
        """One row, its judgement included where reasoning is learned."""
        before = self.unjudged(judged.question, judged.response)
        after = self.tokenizer.encode(judged.judgement) if self.reasoning else []
        tokens = [*before, *after, self.tokenizer.eos]
        return Row(tokens, len(before) if self.reasoning else len(tokens))

    def example(self, item: Item) -> Example:
        return Example(tuple(self.row(side) for side in item.sides), item.safe)


def encode(items: Iterable[Item], encoder: Encodes, longest: int) -> tuple[list[Example], int]:
    """Items as tokens.

    Returns:
        Examples whose rows all have at most `longest` tokens, and how many had longer ones and are left out.

    Raises:
        DataError: reasoning is to be learned, and an item has none.
    """
    examples, dropped = [], 0
    for item in items:
        if encoder.reasoning and not all(side.judgement for side in item.sides):
            prompt = f"prompt={item.first.question[:40]!r}"
            raise DataError(f"{prompt}: has no judgement, which reward_model.reasoning_weight above 0 learns")
        example = encoder.example(item)
        if example.length <= longest:
            examples.append(example)
        else:
            dropped += 1
    return examples, dropped


class Preferences:
    """Examples in the order in which epochs visit them, addressed by position."""

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples, self._seed = examples, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, position: int, size: int) -> list[Example]:
        """Examples `position` to `position + size - 1` of the endless run through the epochs."""
        found = []
        for at in range(position, position + size):
            epoch, place = divmod(at, len(self.examples))
            if self._order[0] != epoch:
                order = np.random.default_rng([self._seed, epoch]).permutation(len(self.examples))
                self._order = (epoch, order)
            found.append(self.examples[int(self._order[1][place])])
        return found


PAIR_FIELDS = ("prompt", "chosen", "rejected")
LABEL_FIELDS = ("prompt", "response")


def read_items(path: Path, pairwise: bool) -> Iterator[Item]:
    """The items of a JSONL file.

    A pair is `prompt`, `chosen`, `rejected`, and for learned reasoning `chosen_judgement`, `rejected_judgement`. A
    labelled response is `prompt`, `response`, `safe` (true or false), and `judgement`. `task` may name a group.

    Raises:
        DataError: a row is broken; names file, line and reason.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _item(_row(line, f"{path}:{number}"), f"{path}:{number}", pairwise)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _row(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: must be one JSON object")
    return row


def _item(row: Mapping[str, Any], place: str, pairwise: bool) -> Item:
    for name in PAIR_FIELDS if pairwise else LABEL_FIELDS:
        if not isinstance(row.get(name), str) or not row[name]:
            raise DataError(f"{place}: {name} must be text")
    if not pairwise and not isinstance(row.get("safe"), bool):
        raise DataError(f"{place}: safe must be true or false")
    prompt, task = row["prompt"], str(row.get("task", "file"))
    if not pairwise:
        return Item(task, Judged(prompt, row["response"], str(row.get("judgement", ""))), safe=row["safe"])
    better, worse = (
        Judged(prompt, row[side], str(row.get(f"{side}_judgement", ""))) for side in ("chosen", "rejected")
    )
    return Item(task, better, worse)
