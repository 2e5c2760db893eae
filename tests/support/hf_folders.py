"""Tiny Hugging Face folders of every family, as transformers itself writes them, with the small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_r1.data.tokenizer import Tokenizer
from tests.support.chats import QWEN, small_tokenizer

ROWS = 640
"""Rows of the embedding; the small tokenizer has fewer ids."""
DENSE: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **{key: size for key, size in DENSE.items() if key != "head_dim"}, "num_hidden_layers": 3, "num_key_value_heads": 4,
    "moe_intermediate_size": 32, "n_shared_experts": 1,
    "n_routed_experts": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
SPARSE: dict[str, Any] = {
    **DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "qwen3_moe": SPARSE,
    "deepseek_v3": LATENT,
}


def write_folder_of(kind: str, folder: Path, end_token: str = "<|im_end|>", **changes: Any) -> Path:
    """A folder that transformers saves, with random weights and a ChatML template.

    Args:
        kind: a key of SHAPES.
        end_token: of tokenizer and config.json; generation_config.json names the tokenizer's <|eos|> too.
        changes: further keys of config.json.
    """
    words = small_tokenizer()
    end = words.id(end_token)
    ids = {"bos_token_id": words.bos, "eos_token_id": end, "pad_token_id": words.pad}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPES[kind] | ids | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.05).add_(1.0 if "norm" in name else 0.0)
    ends = list({end, words.eos})
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    model.generation_config = GenerationConfig(**ids | sampling | {"eos_token_id": ends if ends[1:] else end})
    model.save_pretrained(folder)
    Tokenizer(words.backend, {**words.settings, "eos_token": end_token, "chat_template": QWEN}).save(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; the value `...` removes a key."""
    content = json.loads(path.read_text("utf-8-sig")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    stored = load_file(path)
    change(stored)
    save_file(stored, path, {"format": "pt"})
