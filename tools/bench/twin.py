"""One model twice: ours in megatron-core, and transformers' from the folder that we export, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.config import SpecialTokens, generation_config, hf_config, special_tokens
from megatron_r1.hf.export import hf_tensors, write_folder
from megatron_r1.model.build import native_tensors

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""Implementations of experts that transformers offers on a CPU."""


def export(model: GPTModel, shape: ModelConfig, folder: Path, tokenizer_folder: Path | None = None) -> Path:
    """Write `folder` in Hugging Face's format, without multi-token layers, which transformers does not have."""
    tokens = special_tokens(tokenizer_folder) if tokenizer_folder else SpecialTokens()
    named = hf_tensors(native_tensors(model), shape, include_mtp=False)
    config = hf_config(shape, tokens, include_mtp=False)
    return write_folder(named, folder, config, generation_config(tokens), tokenizer_folder)


def transformers_model(folder: Path) -> Any:
    """transformers' model of an exported folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def expert_choices(shape: ModelConfig) -> tuple[str, ...]:
    """The implementations of experts that can be tried; a dense model has none to choose."""
    return EXPERTS if shape.moe.num_experts else ("eager",)


def use_experts(model: Any, name: str) -> None:
    """Let transformers' model compute its experts so."""
    if name != "eager" or getattr(model.config, "_experts_implementation", "eager") != "eager":
        model.set_experts_implementation(name)
