"""Families of Hugging Face models: each one's names and config.json, both directions, in one place.

A model belongs to exactly one family, which its shape says; a folder to the one that its `model_type` names.
"""

from __future__ import annotations

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_r1.hf.families.dense import LLAMA, QWEN2, QWEN3
from megatron_r1.hf.families.family import Family

FAMILIES: tuple[Family, ...] = (DEEPSEEK_V3, DEEPSEEK_V2, QWEN2, QWEN3, LLAMA)


def family_of(model: ModelConfig) -> Family:
    """The family that has models of this shape."""
    return next(family for family in FAMILIES if family.has(model))
