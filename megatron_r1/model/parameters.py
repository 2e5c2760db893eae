"""How many parameters one token visits, from a model's shape alone: the 37B of "671B total, 37B activated"."""

from __future__ import annotations

from megatron_r1.config.model import ModelConfig
from megatron_r1.memory.parameters import embedding, is_sparse, mtp_layer, of_model, sparse_feed_forward


def activated_parameters(model: ModelConfig, *, include_embedding: bool = False) -> int:
    """Parameters that one token visits in the main model: norms, router and output head included.

    Args:
        include_embedding: count the input embedding too, of which a token only reads one row.
    """
    main = of_model(model).total - mtp_layer(model).total * model.mtp.num_layers
    if not (include_embedding or model.tied_embeddings):
        main -= embedding(model).total
    if not model.moe.num_experts:
        return main
    sparse = sum(is_sparse(model, number) for number in range(model.num_layers))
    expert = sparse_feed_forward(model).experts // model.moe.num_experts
    return main - sparse * (model.moe.num_experts - model.moe.top_k) * expert
