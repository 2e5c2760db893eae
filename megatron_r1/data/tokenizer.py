"""A tokenizer from any Hugging Face folder, among them the byte-level BPE that is trained on the arithmetic world.

Properties of the arithmetic world's tokenizer:

- every text survives `decode(encode(text))`, whatever Unicode it holds;
- numbers from 0 to 199 are one token each (in the assistant world, which has more words, to 99);
- a phrase that the documents repeat is one token, spaces and all, and the R1-Zero template costs at most 48 tokens;
- a prompt of any kind and its response have the same tokens whether they are tokenised separately or together.

For the last property a text is first cut at numbers, at line breaks and at the markers that end a prompt, which no
token crosses. Reading and writing needs `tokenizers` only; `transformers` loads the saved folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megatron_r1.errors import DataError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ADDED = (PAD, BOS, EOS, *ROLES, *TAGS)
"""Tokens that are never split, with ids from 0. All but the tags are special: `skip_special` drops them."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARITHMETIC_SETTINGS: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "additional_special_tokens": list(ROLES),
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1_000_000,
    "chat_template": CHAT_TEMPLATE,
}


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: content of `tokenizer.json`.
        settings: content of `tokenizer_config.json`; it names the end token and, where they exist, the begin and the
            padding token. Without a begin token a text begins with none; without a padding token the end token pads.
    """

    def __init__(self, backend: Backend, settings: Mapping[str, Any] = ARITHMETIC_SETTINGS):
        self.backend, self.settings = backend, settings
        self.eos = self._named("eos_token")
        self.pad = self._named("pad_token") if settings.get("pad_token") else self.eos
        self.bos = self._named("bos_token") if settings.get("bos_token") else None
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def _named(self, role: str) -> int:
        if (token := self.text_of(role)) is None:
            raise DataError(f"tokenizer={role}: tokenizer_config.json does not name this token")
        return self.id(token)

    def text_of(self, role: str) -> str | None:
        """The token of a role, such as `eos_token`; None where the settings name none."""
        value = self.settings.get(role)
        token = value.get("content") if isinstance(value, dict) else value
        return token if isinstance(token, str) else None

    @property
    def begin(self) -> tuple[int, ...]:
        """The tokens at the start of a text: the begin token, or none where the vocabulary has none, as Qwen's."""
        return () if self.bos is None else (self.bos,)

    def id(self, token: str) -> int:
        """Id of one token of the vocabulary, e.g. `<think>`."""
        if (found := self.backend.token_to_id(token)) is None:
            raise DataError(f"token={token}: is not in the vocabulary")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the caller adds begin and end tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel where the machine allows."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of token ids; `skip_special` drops BOS, EOS, PAD and roles and keeps the think and answer tags.

        Ids that end inside a character give U+FFFD for it.
        """
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(dict(self.settings), indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json`, as `save` or a published model's folder has them.

        Raises:
            DataError: one of the two cannot be read, or there is no end token.
        """
        path, described = (Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json"))
        text = _read(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise DataError(f"tokenizer={path}: is not a tokenizer file ({error})") from error
        try:
            settings = json.loads(_read(described))
        except ValueError as error:
            raise DataError(f"tokenizer={described}: is not JSON ({error})") from error
        if not isinstance(settings, dict):
            raise DataError(f"tokenizer={described}: must hold one JSON object")
        if (template := Path(folder) / "chat_template.jinja").is_file():
            settings["chat_template"] = _read(template)
        return cls(backend, settings)

    def has_same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both; end tokens and chat templates may differ."""
        return self.backend.get_vocab(True) == other.backend.get_vocab(True)

    def fingerprint(self) -> str:
        """SHA-256 in hex of all settings on which the ids of a text depend."""
        return hashlib.sha256(f"{self.backend.to_str()} {self.bos} {self.eos} {self.pad}".encode()).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"tokenizer={path}: cannot be read ({reason})") from error


def response_text(response_tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a response without special tokens, as rewards read it."""
    return tokenizer.decode(response_tokens, skip_special=True)
