"""Conversations to token ids and loss masks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from megatron_r1.data.chat.closing import closing_tokens
from megatron_r1.data.chat.render import R1_ZERO, RESPONSE_BEGINS, RESPONSE_ENDS, CannotRender, ChatTemplate
from megatron_r1.data.chat.rows import IN_LOSS, Conversation
from megatron_r1.data.chat.segments import ConversationSegmenter, Segment
from megatron_r1.data.row_files import BadRow
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

_CONTROL = re.compile(r"<[|\uff5c].*[|\uff5c]>")
"""Control tokens of chat templates, in their usual spelling; not every vocabulary marks them as special."""


@dataclass(frozen=True, slots=True)
class ChatExample:
    """One tokenised conversation, or one turn of it."""

    tokens: list[int]
    loss_mask: list[bool]
    """Whether each token is in the loss: it belongs to a response."""


class ChatEncoder:
    """Encodes conversations.

    Args:
        tokenizer: of the model.
        template: renders them.
        loss_on: all, last or each, as in `SftConfig`.
        response_text: template or verbatim, as in `SftConfig`.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, loss_on: str, response_text: str):
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer)
        self._template = template
        end = next(iter(closing_tokens(template, self._control)), tokenizer.decode([tokenizer.eos]))
        self._segmenter = ConversationSegmenter(template, end, self._control, loss_on, response_text)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[ChatExample] | BadRow]:
        """The examples of each conversation, or the reason why it has none."""
        cut = [self._cut(messages) for messages in conversations]
        texts = [s.text for examples in cut if isinstance(examples, list) for each in examples for s in each]
        ids = iter(self._tokenizer.encode_batch(texts))
        encoded: list[list[ChatExample] | BadRow] = []
        for examples in cut:
            if isinstance(examples, list):
                encoded.append([_joined((next(ids), segment.in_loss) for segment in each) for each in examples])
            else:
                encoded.append(examples)
        return encoded

    def _cut(self, messages: Conversation) -> list[list[Segment]] | BadRow:
        try:
            self._check_text(messages)
            self._check_fields(messages)
            return [_merged(segments) for segments in self._segmenter.examples(messages)]
        except BadRow as error:
            return error
        except CannotRender as error:
            return BadRow(str(error))

    def _check_text(self, messages: Conversation) -> None:
        """Refuse text that spells a control token: tokenised, it would become it, and a user could pose as system."""
        for number, message in enumerate(messages, 1):
            for part in message.values():
                if isinstance(part, str) and (found := self._control.search(part)):
                    raise BadRow(f"message {number} holds the control token {found[0]}")

    def _check_fields(self, messages: Conversation) -> None:
        """Refuse fields of messages that nobody reads."""
        read = {"role", "content", IN_LOSS, *self._template.fields}
        for number, message in enumerate(messages, 1):
            if unread := sorted(message.keys() - read):
                raise BadRow(f"message {number} has the field {unread[0]}, which the chat template does not read")


def control_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches every token of the vocabulary that the content of a message must not contain.

    Tags around reasoning, such as <think>, are allowed.
    """
    named = {tokenizer.decode([token]) for token in (*tokenizer.begin, *tokenizer.stop_tokens, tokenizer.pad)}
    named |= {RESPONSE_BEGINS, RESPONSE_ENDS}
    for added in tokenizer.backend.get_added_tokens_decoder().values():
        if added.special or _CONTROL.fullmatch(added.content):
            named.add(added.content)
    return re.compile("|".join(re.escape(text) for text in sorted(named, key=len, reverse=True)))


def template_source(name: str, tokenizer: Tokenizer, key: str) -> str:
    """The text of a chat template.

    Args:
        name: r1_zero, tokenizer (the tokenizer's own) or a file.
        key: configuration key to name in an error.

    Raises:
        ConfigError: the tokenizer has no template, or the file cannot be read.
    """
    if name == "r1_zero":
        return R1_ZERO
    if name == "tokenizer":
        found = tokenizer.settings.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        if not isinstance(found, str):
            raise ConfigError(key, name, "the tokenizer has no chat template: name r1_zero or a file")
        return found
    try:
        return Path(name).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(key, name, "must be r1_zero, tokenizer or a file that can be read") from None


def chat_template(tokenizer: Tokenizer, source: str, name: str, date: str = "") -> ChatTemplate:
    """A template with the tokenizer's special tokens as variables, as in transformers; `date` as in `ChatTemplate`."""
    roles = [role for role in tokenizer.settings if role.endswith("_token")]
    named = {role: text for role in roles if (text := tokenizer.text_of(role)) is not None}
    return ChatTemplate(source, named, name, date)


def key_of(messages: Conversation, seed: int) -> int:
    """A 64-bit hash of seed and content: equal conversations have the same."""
    text = json.dumps([seed, messages], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    """Segments with neighbours of one kind joined, up to the last response."""
    merged = [
        Segment("".join(segment.text for segment in group), in_loss)
        for in_loss, group in groupby((s for s in segments if s.text), key=lambda segment: segment.in_loss)
    ]
    return merged[:-1] if merged and not merged[-1].in_loss else merged


def _joined(parts: Iterable[tuple[list[int], bool]]) -> ChatExample:
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for ids, in_loss in parts:
        tokens += ids
        loss_mask += [in_loss] * len(ids)
    return ChatExample(tokens, loss_mask)


def as_arrays(examples: Sequence[ChatExample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (int32) and loss masks (bool) of all examples end to end, and the tokens of each (int64)."""
    lengths_N = np.fromiter((len(example.tokens) for example in examples), np.int64, len(examples))
    tokens_T = np.fromiter((token for example in examples for token in example.tokens), np.int32, int(lengths_N.sum()))
    loss_mask_T = np.fromiter((flag for example in examples for flag in example.loss_mask), bool, len(tokens_T))
    return tokens_T, loss_mask_T, lengths_N
