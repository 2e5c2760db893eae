"""Trains the byte-level BPE tokenizer of a generated world."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic.worlds import World, world_of
from megatron_r1.data.template import fill_template
from megatron_r1.data.tokenizer import ADDED, BOS, EOS, PAD, ROLES, TAGS, Tokenizer

PIECES = r"\d{1,3}|\n|(?:\. )?Assistant:|User: ?|[AQ]: |[\u95ee\u7b54]\uff1a"
"""Where a text is cut before BPE, in any world: at numbers, line breaks and the markers around a question."""

TRAINING_DOCUMENTS = 10_000
RAREST_PHRASE = 10
"""Occurrences in the training documents from which a piece gets its own token."""
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def train_tokenizer(config: DataConfig) -> Tokenizer:
    """Train a vocabulary of at most `config.vocab_size` tokens on the world's documents and the R1-Zero template.

    Numbers and frequent pieces of documents (phrases with their spaces) become one token each; the rest of the
    vocabulary is byte-level BPE merges, which do not cross word boundaries.
    """
    world = world_of(config)
    cut = Regex("|".join(filter(None, (PIECES, world.pieces))))
    counts = _count_pieces(config, world, cut)
    numbers = [str(number) for number in range(10, world.largest_number + 1)]
    room = config.vocab_size - len(ADDED) - len(numbers) - len(BYTES)
    phrases = [_bytes(piece) for piece, count in counts.most_common() if count >= RAREST_PHRASE]
    phrases = [phrase for phrase in phrases if len(phrase) > 1][:room]
    words = Backend(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTES) + room - len(phrases), initial_alphabet=BYTES, show_progress=False
    )
    words.train_from_iterator((piece for piece, count in sorted(counts.items()) for _ in range(count)), trainer)
    trained = json.loads(words.to_str())["model"]
    entries = dict.fromkeys([*ADDED, *sorted(trained["vocab"], key=trained["vocab"].get), *phrases, *numbers])
    return Tokenizer(_backend(list(entries), [tuple(merge) for merge in trained["merges"]], cut))


def _backend(entries: list[str], merges: list[tuple[str, str]], cut: Regex) -> Backend:
    """A tokenizer that cuts a text, looks each piece up whole, and otherwise applies the merges."""
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(entries)},
            merges=merges,
            ignore_merges=True,  # a piece that is a token is that token
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(cut, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS, *ROLES)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return backend


def _bytes(piece: str) -> str:
    """`piece` in the printable characters with which byte-level BPE spells bytes."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)[0][0]


def _count_pieces(config: DataConfig, world: World, cut: Regex) -> Counter[str]:
    """How often each piece occurs in the template and in the first documents; without numbers and tags."""
    split = pre_tokenizers.Split(cut, "isolated")
    tags = re.compile("|".join(TAGS))
    counts: Counter[str] = Counter()
    for text in (fill_template(""), *islice(world.documents(config), TRAINING_DOCUMENTS)):
        for part in tags.split(text):
            counts.update(piece for piece, _ in split.pre_tokenize_str(part) if not piece.isdecimal())
    return counts
