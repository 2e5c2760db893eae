"""The one table between megatron-core's parameter names (Transformer Engine layout) and Hugging Face's.

Both directions, both lists of shapes, export and load are read off `param_mappings`, which the model's family computes
from the model's config alone. Names and shapes are those of the whole model: unsharded, experts by their global index.
"""

from __future__ import annotations

import re

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.families import family_of
from megatron_r1.hf.param_mapping import ParamMapping, Shape


def param_mappings(model: ModelConfig, include_mtp: bool = True) -> list[ParamMapping]:
    """One mapping for each megatron-core tensor of `model`, in Hugging Face's layer order."""
    return family_of(model).mappings(model, include_mtp)


def native_shapes(model: ModelConfig, include_mtp: bool = True) -> dict[str, Shape]:
    """Shape of every megatron-core tensor by name, for one tensor-parallel rank."""
    return {mapping.native: mapping.native_shape for mapping in param_mappings(model, include_mtp)}


def expected_shapes(model: ModelConfig, include_mtp: bool = True) -> dict[str, Shape]:
    """Shape of every Hugging Face tensor by name, with the copies in multi-token layers."""
    return {name: shape for mapping in param_mappings(model, include_mtp) for name, shape in mapping.hf_shapes.items()}


def canonical_name(native: str) -> str:
    """The table's spelling of a megatron-core name.

    Up to 0.16, and in its sharded checkpoints still, megatron-core says `transformer_layer` for `mtp_model_layer`.
    """
    return re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer.", native)
