"""The parts of a model that one rank holds: one, or several where pipeline stages are interleaved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig


class Chunks(torch.nn.Module):
    """Several parts of one model on a rank, which the interleaved schedule runs in turn; the last comes last."""

    config: TransformerConfig

    def __init__(self, parts: Sequence[GPTModel]):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.config = parts[0].config


type Model = GPTModel | Chunks
"""What a rank holds."""


def chunks(model: Model) -> list[GPTModel]:
    """The rank's parts of a model in the order of their layers; mostly the model itself is the only one."""
    return [*model.parts] if isinstance(model, Chunks) else [model]
