"""Tokenised preference pairs and labelled responses, generated or from files, for the training of reward models.

A sequence is a prompt, the part of the response that the reward model reads, the critique where it is trained on, and
the end token. The score is read from the hidden state of the end token: it attends to the whole sequence, and it is
the same token in every sequence, so that a score does not depend on which token comes last.

For direct preference optimization, `policy_encoder` tokenises the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_r1.data.preference_example import LabelledResponse, PreferenceExample
from megatron_r1.data.row_files import (
    MEDIA_FIELDS,
    PROMPT_FIELDS,
    TOOL_FIELDS,
    BadRow,
    as_object,
    refuse_fields,
    rows_of,
)
from megatron_r1.data.row_sources import RowSource
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

PAIR_FIELDS = ("prompt", "chosen", "rejected")
LABEL_FIELDS = ("prompt", "response")
UNREAD_FIELDS = ("system", *PROMPT_FIELDS, *TOOL_FIELDS, *MEDIA_FIELDS)


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """Prompt, response and, where it is trained on, critique as tokens."""

    tokens: list[int]
    """The last one is the end token, whose hidden state is scored."""
    loss_start: int
    """Index of the first token of the critique, or of a policy's response; from there tokens are in the loss."""


@dataclass(frozen=True, slots=True)
class TokenizedPreference:
    """A `PreferenceExample` as tokens."""

    sequences: tuple[TokenizedSequence, ...]
    """One for each response, the chosen one first."""
    safe: bool

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(sequence.tokens) for sequence in self.sequences)


class PairEncoder(Protocol):
    """Turns labelled responses into tokens."""

    tokenizer: Tokenizer
    reasoning: bool
    """Whether critiques are trained on."""

    def example(self, item: PreferenceExample) -> TokenizedPreference: ...


class RewardModelEncoder:
    """Turns labelled responses into sequences as a reward model reads them.

    Args:
        prompt: question -> the text of the prompt.
        part: response -> the part that is scored: its summary, or all of it.
        reasoning: whether the critique follows and is trained on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Callable[[str], str], part: Callable[[str], str], reasoning: bool):
        self.tokenizer, self.reasoning = tokenizer, reasoning
        self._prompt, self._part = prompt, part

    def without_critique(self, question: str, response: str) -> list[int]:
        """Prompt and the part of the response that is read, before any critique; no end token."""
        begin = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        # Tokenised separately, so that the prompt has the same tokens as for the policy.
        prompt, part = self.tokenizer.encode_batch([self._prompt(question), self._part(response)])
        return [*begin, *prompt, *part]

    def sequence(self, labelled: LabelledResponse) -> TokenizedSequence:
        """One sequence, its critique included where reasoning is trained on."""
        before = self.without_critique(labelled.question, labelled.response)
        after = self.tokenizer.encode(labelled.critique) if self.reasoning else []
        tokens = [*before, *after, self.tokenizer.eos]
        return TokenizedSequence(tokens, len(before) if self.reasoning else len(tokens))

    def example(self, item: PreferenceExample) -> TokenizedPreference:
        return TokenizedPreference(tuple(map(self.sequence, item.responses)), item.safe)


def encode_preferences(
    items: Iterable[PreferenceExample], encoder: PairEncoder, max_length: int
) -> tuple[list[TokenizedPreference], int]:
    """Examples as tokens.

    Returns:
        Examples whose sequences all have at most `max_length` tokens, and how many had longer ones and are dropped.

    Raises:
        DataError: critiques are trained on, and an example has none.
    """
    examples, dropped = [], 0
    for item in items:
        if encoder.reasoning and not all(labelled.critique for labelled in item.responses):
            prompt = f"prompt={item.question[:40]!r}"
            raise DataError(f"{prompt}: has no critique, which reward_model.critique_loss_weight above 0 trains on")
        example = encoder.example(item)
        if example.length <= max_length:
            examples.append(example)
        else:
            dropped += 1
    return examples, dropped


class PreferenceDataset:
    """Examples in the order in which epochs visit them, addressed by position."""

    def __init__(self, examples: Sequence[TokenizedPreference], seed: int):
        self.examples, self._seed = examples, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, position: int, size: int) -> list[TokenizedPreference]:
        """Examples `position` to `position + size - 1` of the endless series of epochs."""
        batch = []
        for at in range(position, position + size):
            epoch, index = divmod(at, len(self.examples))
            if self._order[0] != epoch:
                order = np.random.default_rng([self._seed, epoch]).permutation(len(self.examples))
                self._order = (epoch, order)
            batch.append(self.examples[int(self._order[1][index])])
        return batch


def read_preferences(source: RowSource, pairwise: bool) -> Iterator[PreferenceExample]:
    """The examples of a file or of a dataset's folder.

    The fields of a pair are `prompt`, `chosen`, `rejected` and, where critiques are trained on, `chosen_critique` and
    `rejected_critique`. Those of a labelled response are `prompt`, `response`, `safe` (true or false) and, for
    critiques, `critique`. `task` is optional and names a group of examples.

    Raises:
        ConfigError: the source names no rows.
        DataError: a row is broken; names file, line and reason.
    """
    for location, _, content in rows_of(source.files()):
        try:
            yield _example(as_object(content), pairwise)
        except BadRow as error:
            raise DataError(f"{location}: {error}") from error


def _example(row: Mapping[str, Any], pairwise: bool) -> PreferenceExample:
    refuse_fields(row, UNREAD_FIELDS)
    for name in PAIR_FIELDS if pairwise else LABEL_FIELDS:
        if not isinstance(row.get(name), str) or not row[name]:
            raise BadRow(f"{name} must be text")
    if not pairwise and not isinstance(row.get("safe"), bool):
        raise BadRow("safe must be true or false")
    task = row.get("task")
    task = "file" if task is None else str(task)
    if not pairwise:
        return PreferenceExample(task, _labelled(row, "response", "critique"), safe=row["safe"])
    chosen, rejected = (_labelled(row, name, f"{name}_critique") for name in ("chosen", "rejected"))
    return PreferenceExample(task, chosen, rejected)


def _labelled(row: Mapping[str, Any], response: str, critique: str) -> LabelledResponse:
    return LabelledResponse(row["prompt"], row[response], str(row.get(critique) or ""))  # tables fill gaps with None
