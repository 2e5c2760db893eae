"""The forward pass of sampling: megatron-core's modules, one key-value cache written in place, no autograd.

megatron-core's own inference keeps every key and value whole and passes each token through the same layers of Python as
a training step. Here latent attention attends to the cached latents themselves (DeepSeek-V2 report, section 2.1.2:
"absorbed"), grouped attention reads each key-value head once for all its query heads, and experts are called on sorted
tokens without a dispatcher between ranks. The result is the training forward pass's up to rounding. A model that
multiplies in FP8 keeps keys and values whole and its own dispatcher, because absorbed weights would be quantised
otherwise than those that are trained.

Shapes: B sequences, L new positions, S positions of the cache, D model, H query heads, G key-value heads (1 for
latents), A = H / G query heads of a key-value head, C width of a key, R width of a latent, N and P widths of a key
without and with position, W width of a value, T tokens, E experts, K top-k, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_r1.model.scores import head_weight

Rotate = Callable[[Tensor], Tensor]
"""Turns [B, L, heads, P] by its positions."""


class Cache:
    """Keys and values of all layers. All sequences end at the same position; shorter ones begin with padding."""

    def __init__(self, capacity: int, padding_B: Tensor):
        """
        Args:
            capacity: positions.
            padding_B: positions at the start of each sequence that nothing attends to.
        """
        self.capacity, self.length = capacity, 0
        self._padding_B = padding_B
        self._layers: list[tuple[Tensor, Tensor | None]] = []

    @property
    def sequences(self) -> int:
        return len(self._padding_B)

    def select(self, index_B: Tensor) -> Cache:
        """A cache of these sequences, each as often as it is named."""
        chosen = Cache(self.capacity, self._padding_B[index_B])
        chosen.length = self.length
        chosen._layers = [
            (self._rows(key, index_B), None if value is None else self._rows(value, index_B))
            for key, value in self._layers
        ]
        return chosen

    def _rows(self, stored_BGSC: Tensor, index_B: Tensor) -> Tensor:
        rows_BGSC = stored_BGSC.new_empty(len(index_B), *stored_BGSC.shape[1:])
        rows_BGSC[:, :, : self.length] = stored_BGSC[index_B, :, : self.length]
        return rows_BGSC

    def write(self, layer: int, key_BLGC: Tensor, value_BLGW: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Store a layer's keys and values of new positions; returns those of all positions so far."""
        if layer == len(self._layers):
            self._layers.append((self._room(key_BLGC), None if value_BLGW is None else self._room(value_BLGW)))
        key, value = self._layers[layer]
        end = self.length + key_BLGC.shape[1]
        key[:, :, self.length : end] = key_BLGC.transpose(1, 2)
        if value is None or value_BLGW is None:
            return key[:, :, :end], None
        value[:, :, self.length : end] = value_BLGW.transpose(1, 2)
        return key[:, :, :end], value[:, :, :end]

    def _room(self, new_BLGC: Tensor) -> Tensor:
        sequences, _, heads, width = new_BLGC.shape
        return new_BLGC.new_empty(sequences, heads, self.capacity, width)

    def hidden(self, positions: int, dtype: torch.dtype) -> Tensor | None:
        """What new positions may not attend to, to add to scores [B, G, A, L, S]; None: they may attend to all.

        It is the lowest number rather than infinity: padding may attend to nothing, and must have no empty softmax.
        """
        end = self.length + positions
        device = self._padding_B.device
        key_S = torch.arange(end, device=device)
        hidden_BLS = (key_S < self._padding_B[:, None])[:, None]
        if positions > 1:
            hidden_BLS = hidden_BLS | (key_S > torch.arange(self.length, end, device=device)[:, None])
        elif not self._padding_B.any():
            return None
        return torch.zeros_like(hidden_BLS, dtype=dtype).masked_fill_(hidden_BLS, torch.finfo(dtype).min)[:, None, None]


class Rotary:
    """Rotates queries and keys by their positions, with a table of the angles' cosines and sines."""

    def __init__(self, embedding: Any, interleaved: bool):
        """
        Args:
            embedding: megatron-core's, of plain, YaRN's or Llama 3's positions.
            interleaved: whether neighbours are a pair, as in latent attention, or the two halves of a head.
        """
        self._embedding, self._interleaved = embedding, interleaved
        self._cos_SP = self._sin_SP = torch.empty(0)

    def at(self, start: int, end: int, capacity: int) -> Rotate:
        """The rotation of tokens at these positions, whose table has at least `capacity` positions."""
        if len(self._cos_SP) < capacity:
            made = self._embedding(capacity)
            angles, scale = made if isinstance(made, tuple) else (made, 1.0)
            half_SP = angles[:, 0, 0, : angles.shape[-1] // 2]
            self._cos_SP, self._sin_SP = half_SP.cos() * scale, half_SP.sin() * scale
        cos_L1P, sin_L1P = self._cos_SP[start:end, None], self._sin_SP[start:end, None]

        def rotate(x_BLHP: Tensor) -> Tensor:
            if self._interleaved:
                first, second = x_BLHP[..., ::2], x_BLHP[..., 1::2]
            else:
                first, second = x_BLHP.chunk(2, -1)
            cos, sin = cos_L1P.to(x_BLHP.dtype), sin_L1P.to(x_BLHP.dtype)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        return rotate


class Decoder:
    """Computes the logits of the next tokens from a model's current weights."""

    def __init__(self, model: GPTModel):
        """
        Args:
            model: a whole one, on one rank.
        """
        self._model = model
        latent = model.config.multi_latent_attention
        quantised = bool(model.config.fp8) or getattr(model, "fp8_plan", None) is not None
        attention = (WholeLatentAttention if quantised else AbsorbedAttention) if latent else GroupedAttention
        self._layers = [(layer, attention(layer.self_attention)) for layer in model.decoder.layers]
        self._sparse = _megatron_experts if quantised else _experts
        self._rotary = Rotary(self._layers[0][1].module.rotary_pos_emb if latent else model.rotary_pos_emb, latent)
        self._head_VD = head_weight(model)

    def logits(self, tokens_BL: Tensor, cache: Cache) -> Tensor:
        """Append tokens to every sequence of the cache: logits [B, V] of the token after them, in fp32."""
        hidden_BLD = self._model.embedding.word_embeddings(tokens_BL)
        length, end = tokens_BL.shape[1], cache.length + tokens_BL.shape[1]
        mask = cache.hidden(length, hidden_BLD.dtype)
        rotate = self._rotary.at(cache.length, end, cache.capacity)
        for number, (layer, attention) in enumerate(self._layers):
            query, key, value = attention.project(layer.input_layernorm(hidden_BLD), rotate)
            stored = cache.write(number, key, value)
            hidden_BLD = hidden_BLD + attention.output(_attend(query, *stored, mask, attention.scale))
            normed_BLD = layer.pre_mlp_layernorm(hidden_BLD)
            feed_forward = self._sparse if isinstance(layer.mlp, MoELayer) else _feed_forward
            hidden_BLD = hidden_BLD + feed_forward(layer.mlp, normed_BLD)
        cache.length = end
        return F.linear(self._model.decoder.final_layernorm(hidden_BLD[:, -1]), self._head_VD).float()


def _attend(
    query_BLHC: Tensor, key_BGSC: Tensor, value_BGSW: Tensor | None, hidden: Tensor | None, scale: float
) -> Tensor:
    """Attention [B, L, H, W]; None: the keys are the values. One product takes all query heads of a key-value head."""
    B, L, H, C = query_BLHC.shape
    G = key_BGSC.shape[1]
    query_BGQC = query_BLHC.transpose(1, 2).reshape(B, G, H // G * L, C)
    scores_BGQS = (query_BGQC * scale) @ key_BGSC.transpose(2, 3)
    if hidden is not None:
        scores_BGQS.view(B, G, H // G, L, -1).add_(hidden)
    accumulated = torch.promote_types(scores_BGQS.dtype, torch.float32)
    probs_BGQS = scores_BGQS.softmax(-1, dtype=accumulated).to(scores_BGQS.dtype)
    out_BGQW = probs_BGQS @ (key_BGSC if value_BGSW is None else value_BGSW)
    return out_BGQW.view(B, H, L, -1).transpose(1, 2)


class GroupedAttention:
    """Queries [B, L, H, C], keys and values [B, L, G, C] of attention with shared key-value heads."""

    def __init__(self, module: Any):
        self.module = module
        self._groups, self._width = module.num_query_groups_per_partition, module.hidden_size_per_attention_head
        self.scale = module.core_attention.softmax_scale or self._width**-0.5

    def project(self, x_BLD: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        # Of each key-value head: its query heads, its key, its value.
        mixed_BLGXC = module.linear_qkv(x_BLD)[0].unflatten(-1, (self._groups, -1, self._width))
        turned_BLGXC, value_BLGC = mixed_BLGXC[..., :-1, :], mixed_BLGXC[..., -1, :]
        if module.q_layernorm is not None:
            query, key = turned_BLGXC[..., :-1, :], turned_BLGXC[..., -1:, :]
            turned_BLGXC = torch.cat([module.q_layernorm(query), module.k_layernorm(key)], 3)
        turned_BLGXC = rotate(turned_BLGXC.flatten(2, 3)).unflatten(2, (self._groups, -1))
        return turned_BLGXC[..., :-1, :].flatten(2, 3), turned_BLGXC[..., -1, :], value_BLGC

    def output(self, attended_BLHW: Tensor) -> Tensor:
        projected: Tensor = self.module.linear_proj(attended_BLHW.flatten(2))[0]
        return projected


class WholeLatentAttention:
    """Latent attention whose cache has every head's keys and values."""

    def __init__(self, module: MLASelfAttention):
        self.module = module
        config = module.config
        self._heads, self.scale = module.num_attention_heads_per_partition, module.softmax_scale
        self._plain, self._rotary, self._value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        self._latent = config.kv_lora_rank

    def project(self, x_BLD: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, keys and values [B, L, H, N + P or W]."""
        plain_BLHN, position_BLHP, latent_BLR, shared_BL1P = self._down(x_BLD, rotate)
        up_BLHX = self.module.linear_kv_up_proj(latent_BLR)[0].unflatten(-1, (self._heads, -1))
        key_BLHN, value_BLHW = up_BLHX.split([self._plain, self._value], -1)
        key_BLHC = torch.cat([key_BLHN, shared_BL1P.expand(-1, -1, self._heads, -1)], -1)
        return torch.cat([plain_BLHN, position_BLHP], -1), key_BLHC, value_BLHW

    def _down(self, x_BLD: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries without [B, L, H, N] and with position [B, L, H, P], the latents [B, L, R] before the norm that is in
        their up-projection, and the key with position that all heads share [B, L, 1, P]."""
        module = self.module
        if module.config.q_lora_rank is None:
            query, _ = module.linear_q_proj(x_BLD)
        else:
            query, _ = module.linear_q_up_proj(module.q_layernorm(module.linear_q_down_proj(x_BLD)[0]))
        plain_BLHN, position_BLHP = query.unflatten(-1, (self._heads, -1)).split([self._plain, self._rotary], -1)
        latent_BLR, shared_BLP = module.linear_kv_down_proj(x_BLD)[0].split([self._latent, self._rotary], -1)
        turned = rotate(torch.cat([position_BLHP, shared_BLP[:, :, None]], 2))
        return plain_BLHN, turned[:, :, :-1], module.kv_layernorm(latent_BLR), turned[:, :, -1:]

    def output(self, attended_BLHW: Tensor) -> Tensor:
        projected: Tensor = self.module.linear_proj(attended_BLHW.flatten(2))[0]
        return projected


class AbsorbedAttention(WholeLatentAttention):
    """Latent attention whose keys and values are the latents, of one key-value head; queries are mapped into them."""

    def __init__(self, module: MLASelfAttention):
        super().__init__(module)
        weight_HXR = module.linear_kv_up_proj.weight.unflatten(0, (self._heads, -1))
        self._up_key_HNR, self._up_value_HWR = weight_HXR.split([self._plain, self._value], 1)

    def project(self, x_BLD: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor, None]:
        """Queries [B, L, H, R + P] and keys [B, L, 1, R + P]."""
        plain_BLHN, position_BLHP, latent_BLR, shared_BL1P = self._down(x_BLD, rotate)
        query_BLHR = torch.einsum("blhn,hnr->blhr", plain_BLHN, self._up_key_HNR)
        up = self.module.linear_kv_up_proj
        normed_BLR = F.rms_norm(latent_BLR, (self._latent,), up.layer_norm_weight, up.eps)
        key_BL1C = torch.cat([normed_BLR[:, :, None], shared_BL1P], -1)
        return torch.cat([query_BLHR, position_BLHP], -1), key_BL1C, None

    def output(self, attended_BLHC: Tensor) -> Tensor:
        latent_BLHR = attended_BLHC[..., : self._latent]
        return super().output(torch.einsum("blhr,hwr->blhw", latent_BLHR, self._up_value_HWR))


def _feed_forward(module: Any, x_BLD: Tensor) -> Tensor:
    gate, up = module.linear_fc1(x_BLD)[0].chunk(2, -1)
    out: Tensor = module.linear_fc2(F.silu(gate) * up)[0]
    return out


def _megatron_experts(layer: MoELayer, x_BLD: Tensor) -> Tensor:
    out: Tensor = layer(x_BLD)[0]
    return out


def _experts(layer: MoELayer, x_BLD: Tensor) -> Tensor:
    """Each token's routed experts, weighted, and the experts that all tokens visit."""
    x_TD = x_BLD.flatten(0, 1)
    weights_TK, experts_TK = _route(layer.router, x_TD)
    # Sorted by expert, so that each one multiplies its tokens at once.
    order = experts_TK.flatten().argsort(stable=True)
    counts = experts_TK.flatten().bincount(minlength=layer.config.num_moe_experts).tolist()
    gate, up = layer.experts.linear_fc1(x_TD[order // experts_TK.shape[1]], counts)[0].chunk(2, -1)
    sorted_XD = layer.experts.linear_fc2(F.silu(gate) * up, counts)[0]
    visits_TKD = torch.empty_like(sorted_XD).index_copy_(0, order, sorted_XD).unflatten(0, experts_TK.shape)
    out_BLD = torch.bmm(weights_TK[:, None].to(x_TD.dtype), visits_TKD).view_as(x_BLD)
    return out_BLD + _feed_forward(layer.shared_experts, x_BLD) if layer.use_shared_expert else out_BLD


def _route(router: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K], by the router's own rule."""
    config = router.config
    weights_TK, experts_TK = topk_routing_with_score_function(
        router.gating(x_TD),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
        router_replay=router.router_replay,
        dense_output=True,
    )
    return weights_TK, experts_TK
