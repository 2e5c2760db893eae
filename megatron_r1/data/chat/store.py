"""The examples of a run: read, checked and tokenised once, then stored in the run's folder and memory-mapped.

Every row of a source becomes training or validation examples, or is counted as dropped or bad; bad rows are listed by
file and line. A resumed run must find the same examples as before, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_r1.config.data import DataConfig
from megatron_r1.config.sft import SftConfig
from megatron_r1.data.chat.closing import closing_tokens, is_closed
from megatron_r1.data.chat.encode import (
    ChatEncoder,
    ChatExample,
    as_arrays,
    chat_template,
    control_tokens,
    key_of,
    template_source,
)
from megatron_r1.data.chat.generated import GENERATED
from megatron_r1.data.chat.rows import Conversation, conversation_of
from megatron_r1.data.row_files import BadRow, rows_of
from megatron_r1.data.row_sources import RowSource
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.files import canonical_json, digest_of, sync, take_lock, write_whole

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
CONVERSATIONS_AT_ONCE = 1000
BAD_ROWS = "bad_rows.txt"
TEMPLATE_KEY = "sft.chat_template"


@dataclass(frozen=True)
class Examples:
    """Tokenised examples; N of them, T tokens in all."""

    tokens_T: np.ndarray
    """Token ids, end to end: int32."""
    loss_mask_T: np.ndarray
    """Whether each token is a target: bool."""
    lengths_N: np.ndarray
    """Tokens of each: int64."""
    eval_N: np.ndarray
    """Whether each is for validation, not for training: bool."""
    counts: dict[str, int]
    """Number of rows, examples, bad rows and so on, by name."""


class _FoundChat(NamedTuple):
    """A conversation that is not tokenised yet."""

    location: str
    """file:line."""
    conversation: Conversation
    evaluation: bool


def open_examples(
    sft: SftConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int, seed: int, run_folder: Path
) -> Examples:
    """The examples of a config; several processes may call this at once, and one of them makes the examples.

    Args:
        sequence_length: inputs per sequence; an example may have one token more, a target only.
        seed: of the choice of validation examples.
        run_folder: examples are stored in its folder `data`, bad rows listed in its bad_rows.txt.

    Raises:
        ConfigError: a source or the template cannot be found.
        DataError: too many rows are bad, or the conversations changed since the run started.
    """
    template = template_source(sft.chat_template, tokenizer, TEMPLATE_KEY)
    settings = [FORMAT_VERSION, asdict(sft), asdict(data), sequence_length, seed, template, tokenizer.fingerprint()]
    files = [file for source in _sources(sft).values() for file in source.files()]
    inputs = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = hashlib.sha256(canonical_json([settings, inputs])).hexdigest()[:16]
    data_folder = run_folder / "data"
    data_folder.mkdir(parents=True, exist_ok=True)
    folder, pinned = data_folder / f"examples-{name}", data_folder / "examples.sha256"
    with take_lock(data_folder / "examples.lock", wait=True):
        if not folder.is_dir():
            encoder = ChatEncoder(
                tokenizer,
                chat_template(tokenizer, template, sft.chat_template, sft.template_date),
                sft.loss_on,
                sft.response_text,
            )
            _Maker(sft, data, encoder, sequence_length, seed).make(folder, run_folder / BAD_ROWS)
        content = json.loads((folder / "counts.json").read_text())["sha256"]
        if not pinned.is_file():
            write_whole(pinned, content.encode())
        elif pinned.read_text() != content:
            raise DataError(f"{run_folder}: its conversations changed since this run started")
    return _open(folder)


def inference_tokenizer(sft: SftConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for inference after training: with the template, ending responses where the template closes them.

    Raises:
        ConfigError: the template closes responses with no token, so that no response would ever end.
    """
    source = template_source(sft.chat_template, tokenizer, TEMPLATE_KEY)
    template = chat_template(tokenizer, source, sft.chat_template, sft.template_date)
    control = control_tokens(tokenizer)
    if sft.response_text == "template" and not is_closed(template, control):
        allowed = (
            "must close a response with a control token, where it has generation marks inside them: without one no "
            "response would end; sft.response_text=verbatim adds the end token"
        )
        raise ConfigError(TEMPLATE_KEY, sft.chat_template, allowed)
    ends = [tokenizer.id(text) for text in closing_tokens(template, control)]
    return tokenizer.with_template(source).stopping_at(ends)


def _open(folder: Path) -> Examples:
    counts = json.loads((folder / "counts.json").read_text())
    counts.pop("sha256")
    lengths_N = np.load(folder / "lengths.npy", allow_pickle=False)
    eval_N = np.load(folder / "heldout.npy", allow_pickle=False)
    tokens_T = np.memmap(folder / "tokens.bin", np.int32, "r")
    return Examples(tokens_T, np.memmap(folder / "loss_mask.bin", bool, "r"), lengths_N, eval_N, counts)


def _sources(sft: SftConfig) -> dict[str, RowSource]:
    """The rows of files, by the name of their source; none where conversations are generated."""
    datasets = sft.datasets if sft.source == "files" else {}
    return {name: RowSource.of(dataset, f"sft.datasets.{name}") for name, dataset in datasets.items()}


class _Maker:
    """Makes the folder of examples."""

    def __init__(self, sft: SftConfig, data: DataConfig, encoder: ChatEncoder, sequence_length: int, seed: int):
        self._sft, self._data, self._encoder, self._seed = sft, data, encoder, seed
        self._longest = sequence_length + 1
        self._counts: Counter[str] = Counter()
        self._bad: list[str] = []

    def make(self, folder: Path, bad_rows: Path) -> None:
        """Write `folder`, complete or not at all, and the list of bad rows.

        Raises:
            DataError: too many rows are bad, or no training example remains.
        """
        part = folder.with_suffix(".tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            self._write(part, bad_rows)
            part.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        logger.info("conversations: %s", self._counted())

    def _write(self, part: Path, bad_rows: Path) -> None:
        lengths, keys, evaluation = [], [], []
        with (part / "tokens.bin").open("wb") as tokens, (part / "loss_mask.bin").open("wb") as loss_mask:
            for found in batched(self._found(), CONVERSATIONS_AT_ONCE):
                for row, examples in self._encoded(found):
                    tokens_T, loss_mask_T, lengths_N = as_arrays(examples)
                    tokens_T.tofile(tokens)
                    loss_mask_T.tofile(loss_mask)
                    lengths.append(lengths_N)
                    keys += [key_of(row.conversation, self._seed)] * len(examples)
                    evaluation += [row.evaluation] * len(examples)
        self._check_bad_rows(bad_rows)
        lengths_N = np.concatenate([*lengths, np.empty(0, np.int64)])
        eval_N = np.array(evaluation, dtype=bool) | self._drawn(np.array(keys, dtype=np.uint64))
        if not (~eval_N).any():
            raise DataError(f"sft: no training example remains ({self._counted()})")
        np.save(part / "lengths.npy", lengths_N)
        np.save(part / "heldout.npy", eval_N)
        counts: dict[str, Any] = {**self._counts, "examples": len(lengths_N), "heldout": int(eval_N.sum())}
        files = [part / name for name in ("tokens.bin", "loss_mask.bin", "lengths.npy", "heldout.npy")]
        counts["sha256"] = hashlib.sha256(canonical_json([digest_of(file) for file in files])).hexdigest()
        for file in files:
            sync(file)
        write_whole(part / "counts.json", canonical_json(counts))

    def _found(self) -> Iterator[_FoundChat]:
        """All conversations; also counts the rows and notes the bad ones."""
        source = self._sft.source
        if world := GENERATED.get(source):
            training = world.training(self._data, self._sft.num_conversations)
            eval_conversations = world.evaluation(self._data, self._sft.eval_examples)
            for evaluation, conversations in ((False, training), (True, eval_conversations)):
                for number, conversation in enumerate(conversations, 1):
                    self._counts["rows"] += 1
                    yield _FoundChat(f"{'held-out' if evaluation else source}:{number}", conversation, evaluation)
            return
        for name, rows in _sources(self._sft).items():
            fields = self._sft.datasets[name]
            for location, _, content in rows_of(rows.files()):
                self._counts["rows"] += 1
                try:
                    yield _FoundChat(location, conversation_of(content, fields, self._sft.system_prompt), False)
                except BadRow as error:
                    self._bad.append(f"{location}: {error}")

    def _encoded(self, found: Sequence[_FoundChat]) -> Iterator[tuple[_FoundChat, list[ChatExample]]]:
        """Conversations with their tokenised examples; notes those that cannot be trained on."""
        encoded = self._encoder.encode([row.conversation for row in found])
        for row, examples in zip(found, encoded, strict=True):
            if isinstance(examples, BadRow):
                self._bad.append(f"{row.location}: {examples}")
            elif not all(any(example.loss_mask[1:]) for example in examples):
                self._bad.append(f"{row.location}: has a response without a prompt")
            else:
                yield row, [short for example in examples if (short := self._shortened(example))]

    def _shortened(self, example: ChatExample) -> ChatExample | None:
        """The example, truncated to a sequence where that is configured; None where it is dropped."""
        if len(example.tokens) <= self._longest:
            return example
        if self._sft.overlong == "truncate" and any(example.loss_mask[1 : self._longest]):
            self._counts["truncated"] += 1
            return ChatExample(example.tokens[: self._longest], example.loss_mask[: self._longest])
        self._counts["dropped_too_long"] += 1
        return None

    def _check_bad_rows(self, path: Path) -> None:
        self._counts["bad_rows"] = len(self._bad)
        if not self._bad:
            path.unlink(missing_ok=True)
            return
        path.write_text("\n".join(self._bad) + "\n", encoding="utf-8")
        allowed = max(self._sft.max_bad_rows, int(self._sft.max_bad_share * self._counts["rows"]))
        if len(self._bad) > allowed:
            raise DataError(
                f"{len(self._bad)} of {self._counts['rows']} rows are bad and {allowed} may be (sft.max_bad_rows, "
                f"sft.max_bad_share); the first: {self._bad[0]}; all of them: {path}"
            )

    def _drawn(self, keys_N: np.ndarray) -> np.ndarray:
        """Which examples of files are for validation: bool [N]; equal conversations are on the same side."""
        if self._sft.source != "files" or not self._sft.eval_examples:
            return np.zeros(len(keys_N), bool)
        smallest = np.unique(keys_N)[: self._sft.eval_examples]
        return np.isin(keys_N, smallest)

    def _counted(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self._counts.items()))
