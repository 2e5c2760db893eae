"""The one table between megatron-core's parameter names (Transformer Engine layout) and Hugging Face's DeepSeek-V3.

Both directions, both lists of shapes, export and load are read off `rows`, which is computed from the model's config
alone. Names and shapes are those of the whole model: unsharded, experts by their global index.
Hugging Face numbers the multi-token layers after the decoder layers and stores the embedding and the head a second
time in each of them; megatron-core shares those two, so there they are `copies` of a row and not rows of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_r1.config.model import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One megatron-core tensor and the Hugging Face tensors that hold the same numbers."""

    native: str
    """Name in megatron-core."""
    hf: tuple[str, ...]
    """Names in Hugging Face; several are the native tensor's equal parts along dimension 0 (gate first, then up)."""
    part_shape: Shape
    """Shape of each Hugging Face part."""
    copies: tuple[str, ...] = ()
    """Further Hugging Face names that repeat the whole tensor."""
    float32: bool = False
    """Stored in float32 whatever the model's type is (the router's balancing bias)."""

    @property
    def native_shape(self) -> Shape:
        return (len(self.hf) * self.part_shape[0], *self.part_shape[1:])


def rows(model: ModelConfig, include_mtp: bool = True) -> list[Row]:
    """The table: one row for each megatron-core tensor of `model`, in Hugging Face's layer order."""
    hidden, vocab = model.hidden_size, model.vocab_size
    mtp_layers = [model.num_layers + depth for depth in range(model.mtp.num_layers if include_mtp else 0)]
    embedding_copies = tuple(f"model.layers.{layer}.embed_tokens.weight" for layer in mtp_layers)
    head_copies = tuple(f"model.layers.{layer}.shared_head.head.weight" for layer in mtp_layers)
    table = [Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (vocab, hidden), embedding_copies)]
    for layer in range(model.num_layers):
        dense = layer < model.moe.first_dense_layers
        table += _layer(model, f"decoder.layers.{layer}", f"model.layers.{layer}", dense)
    table.append(Row("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,)))
    table.append(Row("output_layer.weight", ("lm_head.weight",), (vocab, hidden), head_copies))
    for depth, layer in enumerate(mtp_layers):
        table += _multi_token_layer(model, f"mtp.layers.{depth}", f"model.layers.{layer}")
    return table


def native_shapes(model: ModelConfig, include_mtp: bool = True) -> dict[str, Shape]:
    """Shape of every megatron-core tensor by name, for one tensor-parallel rank."""
    return {row.native: row.native_shape for row in rows(model, include_mtp)}


def expected_shapes(model: ModelConfig, include_mtp: bool = True) -> dict[str, Shape]:
    """Shape of every Hugging Face tensor by name, with the copies in multi-token layers."""
    return {name: row.part_shape for row in rows(model, include_mtp) for name in row.hf + row.copies}


def canonical(native: str) -> str:
    """The table's spelling of a megatron-core name.

    Up to 0.16, and in its sharded checkpoints still, megatron-core says `transformer_layer` for `mtp_model_layer`.
    """
    return re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer.", native)


def _layer(model: ModelConfig, native: str, hf: str, dense: bool) -> Iterator[Row]:
    hidden = model.hidden_size
    yield Row(f"{native}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), (hidden,))
    yield from _attention(model, f"{native}.self_attention", f"{hf}.self_attn")
    # A dense layer's norm is fused into its first linear; before experts it stands alone.
    norm = f"{native}.mlp.linear_fc1.layer_norm_weight" if dense else f"{native}.pre_mlp_layernorm.weight"
    yield Row(norm, (f"{hf}.post_attention_layernorm.weight",), (hidden,))
    if dense:
        yield from _feed_forward(f"{native}.mlp", "", f"{hf}.mlp", hidden, model.ffn_hidden_size)
    else:
        yield from _experts(model, f"{native}.mlp", f"{hf}.mlp")


def _attention(model: ModelConfig, native: str, hf: str) -> Iterator[Row]:
    hidden, heads, attention = model.hidden_size, model.num_attention_heads, model.attention
    query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    query_rank, latent = attention.q_lora_rank, attention.kv_lora_rank
    if query_rank:
        yield Row(f"{native}.linear_q_down_proj.weight", (f"{hf}.q_a_proj.weight",), (query_rank, hidden))
        yield Row(f"{native}.linear_q_up_proj.layer_norm_weight", (f"{hf}.q_a_layernorm.weight",), (query_rank,))
        yield Row(f"{native}.linear_q_up_proj.weight", (f"{hf}.q_b_proj.weight",), (query, query_rank))
    else:
        yield Row(f"{native}.linear_q_proj.weight", (f"{hf}.q_proj.weight",), (query, hidden))
    down, up = latent + attention.qk_rope_head_dim, heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield Row(f"{native}.linear_kv_down_proj.weight", (f"{hf}.kv_a_proj_with_mqa.weight",), (down, hidden))
    yield Row(f"{native}.linear_kv_up_proj.layer_norm_weight", (f"{hf}.kv_a_layernorm.weight",), (latent,))
    yield Row(f"{native}.linear_kv_up_proj.weight", (f"{hf}.kv_b_proj.weight",), (up, latent))
    yield Row(f"{native}.linear_proj.weight", (f"{hf}.o_proj.weight",), (hidden, heads * attention.v_head_dim))


def _experts(model: ModelConfig, native: str, hf: str) -> Iterator[Row]:
    hidden, moe = model.hidden_size, model.moe
    yield Row(f"{native}.router.weight", (f"{hf}.gate.weight",), (moe.num_experts, hidden))
    bias = (f"{hf}.gate.e_score_correction_bias",)
    yield Row(f"{native}.router.expert_bias", bias, (moe.num_experts,), float32=True)
    for expert in range(moe.num_experts):
        width = moe.ffn_hidden_size
        yield from _feed_forward(f"{native}.experts", str(expert), f"{hf}.experts.{expert}", hidden, width)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.ffn_hidden_size
        yield from _feed_forward(f"{native}.shared_experts", "", f"{hf}.shared_experts", hidden, width)


def _feed_forward(native: str, expert: str, hf: str, hidden: int, width: int) -> Iterator[Row]:
    gate_and_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    yield Row(f"{native}.linear_fc1.weight{expert}", gate_and_up, (width, hidden))
    yield Row(f"{native}.linear_fc2.weight{expert}", (f"{hf}.down_proj.weight",), (hidden, width))


def _multi_token_layer(model: ModelConfig, native: str, hf: str) -> Iterator[Row]:
    hidden = model.hidden_size
    yield Row(f"{native}.enorm.weight", (f"{hf}.enorm.weight",), (hidden,))
    yield Row(f"{native}.hnorm.weight", (f"{hf}.hnorm.weight",), (hidden,))
    yield Row(f"{native}.eh_proj.weight", (f"{hf}.eh_proj.weight",), (hidden, 2 * hidden))
    yield from _layer(model, f"{native}.mtp_model_layer", hf, dense=False)
    yield Row(f"{native}.final_layernorm.weight", (f"{hf}.shared_head.norm.weight",), (hidden,))
