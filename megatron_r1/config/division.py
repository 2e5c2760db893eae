"""What degrees of parallelism ask of a model's shape: whatever ranks share must be divisible among them."""

from __future__ import annotations

from megatron_r1.config.attention import GroupedAttentionConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.errors import ConfigError


def check_division(degrees: ParallelConfig, model: ModelConfig) -> None:
    """Refuse a model that ranks cannot share by these degrees.

    Raises:
        ConfigError: names the degree that does not fit.
    """
    if degrees.expert > 1 and not model.moe.num_experts:
        raise ConfigError("parallel.expert", degrees.expert, "must be 1: the model has no experts")
    attention = model.attention
    key_value_heads = attention.num_key_value_heads if isinstance(attention, GroupedAttentionConfig) else 0
    shared_experts_width = model.moe.num_shared_experts * model.moe.ffn_hidden_size
    for key, degree, name, amount in (
        ("tensor", degrees.tensor, "model.num_attention_heads", model.num_attention_heads),
        ("tensor", degrees.tensor, "model.attention.num_key_value_heads", key_value_heads),
        ("tensor", degrees.tensor, "model.ffn_hidden_size", model.ffn_hidden_size),
        ("tensor", degrees.tensor, "model.vocab_size", model.vocab_size),
        ("tensor", degrees.tensor, "model.moe.num_shared_experts x ffn_hidden_size", shared_experts_width),
        ("expert", degrees.expert, "model.moe.num_experts", model.moe.num_experts),
        ("expert_tensor", degrees.expert_tensor, "model.moe.ffn_hidden_size", model.moe.ffn_hidden_size),
    ):
        if amount % degree:
            raise ConfigError(f"parallel.{key}", degree, f"must divide {name}={amount}")
    _check_stages(degrees, model)


def check_sequences(degrees: ParallelConfig, length: int) -> None:
    """Refuse sequences of this length that ranks cannot share.

    Raises:
        ConfigError: names the degree that does not fit.
    """
    if length % degrees.tensor:
        raise ConfigError("parallel.tensor", degrees.tensor, f"must divide train.sequence_length={length}")
    pieces = degrees.tensor * 2 * degrees.context
    if degrees.context > 1 and length % pieces:
        allowed = f"tensor x 2 x context={pieces} must divide train.sequence_length={length}"
        raise ConfigError("parallel.context", degrees.context, allowed)


def _check_stages(degrees: ParallelConfig, model: ModelConfig) -> None:
    if not degrees.pipeline_layers and model.num_layers % degrees.stages:
        key = "pipeline" if model.num_layers % degrees.pipeline else "virtual_pipeline"
        raise ConfigError(
            f"parallel.{key}",
            getattr(degrees, key),
            f"must divide model.num_layers={model.num_layers}, or pipeline_layers must say what each stage holds",
        )
    if degrees.pipeline_layers and sum(degrees.pipeline_layers) != model.num_layers:
        raise ConfigError(
            "parallel.pipeline_layers",
            degrees.pipeline_layers,
            f"must sum up to model.num_layers={model.num_layers}",
        )
