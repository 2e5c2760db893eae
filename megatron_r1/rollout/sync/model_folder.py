"""The folder that a server starts from when it has no weights yet: the model's shape alone."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.hf.config import generation_config, serving_view, special_tokens
from megatron_r1.hf.export import write_companions
from megatron_r1.rollout.sync.payload import WeightPayload


def write_shape(parent: Path, payload: WeightPayload, tokenizer_folder: Path) -> Path:
    """Write the config of the weights that syncs will send; returns the folder, inside `parent`, to serve.

    Args:
        payload: which weights are sent, and in which formats.
        tokenizer_folder: names the special tokens.

    Raises:
        DataError: a special token has no id.
    """
    folder, tokens = parent / "export", special_tokens(tokenizer_folder)
    folder.mkdir()
    write_companions(folder, payload.config(tokens), generation_config(tokens), None)
    return serving_view(folder, parent / "view")
