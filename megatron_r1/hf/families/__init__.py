"""Families of Hugging Face models: each one's names and config.json, both directions, in one place.

A model belongs to exactly one family, which its shape says; a folder to the one that its `model_type` names. Both lists
of shapes, export and load are read off `param_mappings`: names and shapes are those of the whole model, unsharded, with
experts by their global index, megatron-core's in the layout of Transformer Engine.
"""

from __future__ import annotations

import re

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_r1.hf.families.family import Family
from megatron_r1.hf.families.grouped import LLAMA, QWEN2, QWEN3, QWEN3_MOE
from megatron_r1.hf.param_mapping import ParamMapping

FAMILIES: tuple[Family, ...] = (DEEPSEEK_V3, DEEPSEEK_V2, QWEN2, QWEN3, QWEN3_MOE, LLAMA)


def family_of(model: ModelConfig) -> Family:
    """The family that has models of this shape."""
    return next(family for family in FAMILIES if family.has(model))


def param_mappings(model: ModelConfig, include_mtp: bool = True) -> list[ParamMapping]:
    """One mapping for each megatron-core tensor of `model`, in Hugging Face's layer order."""
    return family_of(model).mappings(model, include_mtp)


def canonical_name(native: str) -> str:
    """The table's spelling of a megatron-core name.

    Up to 0.16, and in its sharded checkpoints still, megatron-core says `transformer_layer` for `mtp_model_layer`.
    """
    return re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer.", native)
