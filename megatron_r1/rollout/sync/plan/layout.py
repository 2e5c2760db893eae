"""Which rank of a layout holds which part of which weight, from the degrees of parallelism alone.

A running trainer asks megatron-core's metadata (model/shards.py) and never this file. The rules below say the same of
layouts that are not running; the tests hold the two against each other, part by part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline_stages import mtp_stage
from megatron_r1.errors import ConfigError
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.param_mapping import ParamMapping, Shape
from megatron_r1.model.shards import ShardDirectory, ShardLocation
from megatron_r1.model.spec import DTYPES

ROWS = re.compile(
    r"(word_embeddings|output_layer|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_qkv|linear_fc1|eh_proj)"
    r"\.(weight|bias)\d*$"
)
"""Weights whose rows (outputs) tensor-parallel ranks share; of a gated feed-forward those of gate and up each."""
COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight\d*$")
"""Weights whose columns (inputs) they share. Every other weight is whole on each of them."""
EXPERT = re.compile(r"\.mlp\.experts\.linear_fc[12]\.weight(\d+)$")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def predicted(model: ModelConfig, parallel: ParallelConfig, ranks: int) -> tuple[ShardDirectory, list[int]]:
    """What megatron-core's metadata will say: the parts of every weight by owner, and each rank's pipeline stage.

    Raises:
        ConfigError: layers or experts cannot be shared out evenly.
    """
    stages = _Stages(model, parallel)
    a_stage = ranks // parallel.pipeline
    everything: ShardDirectory = {}
    for mapping in sorted(param_mappings(model), key=lambda mapping: mapping.native):
        first = stages.of(mapping.native) * a_stage
        dtype = torch.float32 if mapping.float32 else DTYPES[model.dtype]
        parts = [
            ShardLocation(first + rank, place, _extent(place), dtype)
            for rank, place in _places(mapping, model, parallel)
        ]
        everything[mapping.native] = mapping.native_shape, parts
    return everything, [rank // a_stage for rank in range(ranks)]


def tensor_split(native: str) -> int | None:
    """The dimension of a weight that tensor-parallel ranks share; None where each has it whole."""
    return 0 if ROWS.search(native) else 1 if COLUMNS.search(native) else None


def expert_number(native: str) -> int | None:
    """Which routed expert a weight belongs to."""
    match = EXPERT.search(native)
    return int(match[1]) if match else None


def _places(
    mapping: ParamMapping, model: ModelConfig, parallel: ParallelConfig
) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """The parts of a weight: the rank, counted within its stage, that speaks for a part, and where the part lies."""
    expert, split = expert_number(mapping.native), tensor_split(mapping.native)
    shares = parallel.tensor if expert is None else parallel.expert_tensor
    first = 0
    if expert is not None:
        each, rest = divmod(model.moe.num_experts, parallel.expert)
        if rest:
            raise ConfigError("parallel.expert", parallel.expert, f"must divide the {model.moe.num_experts} experts")
        first = expert // each * shares
    shape = mapping.native_shape
    whole = tuple(slice(0, size) for size in shape)
    if split is None:
        yield first, whole
        return
    halves = 2 if "linear_fc1" in mapping.native else 1  # gate and up are shared out one by one
    size = shape[split] // halves
    if size % shares:
        raise ConfigError("parallel.tensor", shares, f"must divide {size}, dimension {split} of {mapping.native}")
    share = size // shares
    for rank in range(shares):
        for half in range(halves):
            start = half * size + rank * share
            yield first + rank, (*whole[:split], slice(start, start + share), *whole[split + 1 :])


def _extent(place: tuple[slice, ...]) -> Shape:
    return tuple(part.stop - part.start for part in place)


class _Stages:
    """Which pipeline rank holds a weight; where stages are interleaved, a rank holds several of them."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig):
        stages = parallel.stages_of(model.num_layers, model.mtp.num_layers)
        self._of_layer = [index % parallel.pipeline for index, stage in enumerate(stages) for _ in range(stage.layers)]
        self._last, self._mtp = parallel.pipeline - 1, mtp_stage(stages) % parallel.pipeline
        # megatron-core puts the final norm behind the last layer, unless there is no multi-token layer to read it.
        self._final_norm = self._of_layer[-1] if model.mtp.num_layers else self._last

    def of(self, native: str) -> int:
        match = _LAYER.match(native)
        if match:
            return self._of_layer[int(match[1])]
        if native.startswith("decoder.final_layernorm."):
            return self._final_norm
        if native.startswith("mtp."):
            return self._mtp
        return 0 if native.startswith("embedding.") else self._last
