"""The one table between megatron-core's parameter names (Transformer Engine layout) and Hugging Face's.

Both directions, both lists of shapes, export and load are read off `param_mappings`, which the model's family computes
from the model's config alone. Names and shapes are those of the whole model: unsharded, experts by their global index.
"""

from __future__ import annotations

import re

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.families import family_of
from megatron_r1.hf.param_mapping import ParamMapping


def param_mappings(model: ModelConfig, include_mtp: bool = True) -> list[ParamMapping]:
    """One mapping for each megatron-core tensor of `model`, in Hugging Face's layer order."""
    return family_of(model).mappings(model, include_mtp)


def canonical_name(native: str) -> str:
    """The table's spelling of a megatron-core name.

    Up to 0.16, and in its sharded checkpoints still, megatron-core says `transformer_layer` for `mtp_model_layer`.
    """
    return re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer.", native)
