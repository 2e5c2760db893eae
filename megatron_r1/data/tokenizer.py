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
from megatron_r1.files import read_json, read_text

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ADDED = (PAD, BOS, EOS, *ROLES, *TAGS)
"""Tokens that are never split, with ids from 0. All but the tags are special: `skip_special` drops them."""

GENERATION_FILE = "generation_config.json"
COMPANIONS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""Further files of a published model that belong to its tokenizer or must stay with it; patterns of relative paths."""

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
        generation: content of `generation_config.json`, which may name further end tokens.
        companions: further files of the folder, by relative path; they go where the tokenizer goes.

    Raises:
        DataError: a named token is not in the vocabulary, or an end token is an ordinary one.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Mapping[str, Any] = ARITHMETIC_SETTINGS,
        generation: Mapping[str, Any] | None = None,
        companions: Mapping[str, bytes] | None = None,
    ):
        self.backend, self.settings = backend, settings
        self.generation, self.companions = dict(generation or {}), dict(companions or {})
        self.eos = self._named("eos_token")
        self.pad = self._named("pad_token") if settings.get("pad_token") else self.eos
        self.bos = self._named("bos_token") if settings.get("bos_token") else None
        # Ids may have gaps: the number of tokens says nothing of the largest.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        """Embeddings that a model needs at least: one more than the largest id."""
        self.stop_tokens = self._all_ends()
        """Every token that ends a response, the tokenizer's end token first."""

    def _all_ends(self) -> tuple[int, ...]:
        listed = self.generation.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        control = self.backend.get_added_tokens_decoder()
        for token in listed:
            if not isinstance(token, int) or token not in (self.eos, *control):
                text = self.backend.id_to_token(token) if isinstance(token, int) and token >= 0 else None
                found = "it has no such token" if text is None else f"not the ordinary {text!r}"
                allowed = f"must be a control token of the tokenizer, {found}"
                raise DataError(f"{GENERATION_FILE}: eos_token_id={token}: {allowed}")
        return tuple(dict.fromkeys((self.eos, *listed)))

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

    def generation_settings(self) -> dict[str, Any]:
        """Settings of generation with every end token; empty where there is nothing beyond the tokenizer's own."""
        ends = list(self.stop_tokens)
        return {**self.generation, "eos_token_id": ends if ends[1:] else ends[0]} if self.generation else {}

    def stopping_at(self, tokens: Iterable[int]) -> Tokenizer:
        """The same tokenizer, with which responses end at these tokens too."""
        ends = list(dict.fromkeys((*self.stop_tokens, *tokens)))
        if len(ends) == len(self.stop_tokens):
            return self
        return Tokenizer(self.backend, self.settings, {**self.generation, "eos_token_id": ends}, self.companions)

    def with_template(self, template: str) -> Tokenizer:
        """The same tokenizer with this chat template."""
        settings = {**self.settings, "chat_template": template}
        return Tokenizer(self.backend, settings, self.generation, self.companions)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` reads.

        Settings of generation and companions go along, where there are some.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        contents = {"tokenizer_config.json": dict(self.settings)}
        contents |= {GENERATION_FILE: self.generation} if self.generation else {}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, companion in self.companions.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(companion)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json`, as `save` or a published model's folder has them.

        End tokens are also those of `generation_config.json`, or of `config.json` where that one has none.

        Raises:
            DataError: one of the two cannot be read, or there is no end token.
        """
        path, described = (Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json"))
        text = read_text(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise DataError(f"tokenizer={path}: is not a tokenizer file ({error})") from error
        settings = read_json(described)
        if (template := Path(folder) / "chat_template.jinja").is_file():
            settings["chat_template"] = read_text(template)
        companions = {str(path.relative_to(folder)): path.read_bytes() for path in companions_of(folder)}
        return cls(backend, settings, _generation_of(Path(folder)), companions)

    def has_same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both; end tokens and chat templates may differ."""
        return self.backend.get_vocab(True) == other.backend.get_vocab(True)

    def fingerprint(self) -> str:
        """SHA-256 in hex of all settings on which the ids of a text depend."""
        return hashlib.sha256(f"{self.backend.to_str()} {self.bos} {self.eos} {self.pad}".encode()).hexdigest()


def companions_of(folder: Path) -> list[Path]:
    """Those of a folder's companion files that are there."""
    return sorted(path for pattern in COMPANIONS for path in Path(folder).glob(pattern) if path.is_file())


def _generation_of(folder: Path) -> dict[str, Any]:
    """Settings of generation; transformers too takes end tokens from config.json where they do not name one."""
    path, model = folder / GENERATION_FILE, folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings.get("eos_token_id") is None and model.is_file():
        ends = read_json(model).get("eos_token_id")
        settings |= {} if ends is None else {"eos_token_id": ends}
    return settings


def response_text(response_tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a response without special tokens and without the token that ends it, as rewards read it."""
    if len(response_tokens) and response_tokens[-1] in tokenizer.stop_tokens:
        response_tokens = response_tokens[:-1]
    return tokenizer.decode(response_tokens, skip_special=True)
