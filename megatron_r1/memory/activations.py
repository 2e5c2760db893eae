"""Bytes that a forward pass keeps for its backward pass, per token of a rank, by kind of layer.

Two backends keep different tensors: Transformer Engine's modules on a GPU, and the torch modules in their place on a
CPU. The terms below say which tensor each one is; those of the CPU are measured (tests/memory). Those of a GPU follow
from reading megatron-core 0.19 and Transformer Engine 2.20, and are within 5 % of published peaks in bf16 without
recomputation (tests/memory/test_published_peaks.py); with FP8 or recomputation they are unverified.

With sequence parallelism, tokens outside of attention and of the experts are divided among tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.model import AttentionConfig, GroupedAttentionConfig
from megatron_r1.config.performance import recomputed_modules
from megatron_r1.config.run import RunConfig

FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True)
class ActivationSizes:
    """Sizes by which tensors that are kept are counted."""

    config: RunConfig
    gpu: bool
    """Whether Transformer Engine's modules run."""
    imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean."""

    @property
    def element(self) -> int:
        """Bytes of a number of the model's type."""
        return 2 if self.config.model.dtype == "bf16" else 4

    @property
    def operand(self) -> float:
        """Bytes of a number of a linear layer's input: in FP8 blocks, with a scale for 128 of them, where it is on."""
        return 1 + FP32 / 128 if self.config.fp8.enabled and self.gpu else self.element

    @property
    def tensor(self) -> int:
        """Ranks that share each sequence outside of attention."""
        return self.config.parallel.tensor

    def recomputes(self, *names: str) -> bool:
        """Whether any of these modules is computed again in the backward pass."""
        return not {*names}.isdisjoint(recomputed_modules(self.config.performance, self.config.model))

    def norm(self, width: int) -> float:
        """What a norm keeps: its input; in bf16 on a CPU, its input and its normalised input in fp32."""
        if self.gpu:
            return self.element * width + FP32
        return (FP32 if self.element == FP32 else 2 * FP32) * width + FP32

    def attention(self) -> float:
        """Attention, its input norm and its projections."""
        model = self.config.model
        attention, heads = model.attention, model.num_attention_heads / self.tensor
        kept = self.norm(model.hidden_size) / self.tensor
        kept += 0 if self.recomputes("layernorm") else self.operand * model.hidden_size / self.tensor
        if isinstance(attention, GroupedAttentionConfig):
            query = value = attention.head_dim
            keys = attention.num_key_value_heads / self.tensor
            # Queries and keys before their norms.
            kept += (heads + keys) * self.norm(attention.head_dim) if attention.qk_norm else 0.0
        else:
            query = attention.qk_nope_head_dim + attention.qk_rope_head_dim
            value = attention.v_head_dim if self.gpu else max(query, attention.v_head_dim)  # torch pads values
            keys = heads
            kept += self._latents(attention)
        # On a CPU a rank gathers all keys and values of a sequence that context-parallel ranks share.
        keys *= 1 if self.gpu else self.config.parallel.context
        if not self.recomputes("mla_up_proj"):
            kept += self.element * (heads * query + keys * (query + value))
        if not self.recomputes("core_attn"):
            kept += heads * (self.element * value + FP32)  # the output, and the scores' logarithmic sum
        output = heads * (value if isinstance(attention, GroupedAttentionConfig) else attention.v_head_dim)
        return kept + self.operand * output  # input of the output projection

    def _latents(self, attention: AttentionConfig) -> float:
        rank, latent, rotary = attention.q_lora_rank, attention.kv_lora_rank, attention.qk_rope_head_dim
        kept = self.norm(rank) if rank else 0.0
        kept += self.norm(latent) + self.element * rotary
        inputs = 0 if self.recomputes("mla_up_proj") else self.operand * (rank + latent)
        return (kept + inputs) / self.tensor

    def dense_feed_forward(self) -> float:
        """A dense layer's feed-forward with its norm."""
        model = self.config.model
        kept = self.norm(model.hidden_size) / self.tensor
        if self.recomputes("mlp"):
            return kept
        kept += self.operand * model.hidden_size / self.tensor
        return kept + self._gated(model.ffn_hidden_size / self.tensor, "")

    def _gated(self, width: float, module: str) -> float:
        """A gated feed-forward: gate and up, and their product unless it is computed again."""
        return self.element * 2 * width + (0 if module and self.recomputes(module) else self.operand * width)

    def sparse_feed_forward(self) -> float:
        """A sparse layer's feed-forward with its norm."""
        model, moe = self.config.model, self.config.model.moe
        kept = self.norm(model.hidden_size) / self.tensor
        if self.recomputes("moe"):
            return kept
        kept += 0 if self.recomputes("layernorm") else self.element * model.hidden_size / self.tensor
        if moe.num_shared_experts and not self.recomputes("shared_experts"):
            kept += self._gated(moe.num_shared_experts * moe.ffn_hidden_size / self.tensor, "")
        return kept + self._router() + self._experts()

    def _router(self) -> float:
        """Scores and chosen experts of a token; tokens are divided among tensor-parallel ranks."""
        moe = self.config.model.moe
        scores = moe.num_experts * (2 * FP32 + 1) + moe.top_k * (2 * INT64 + FP32) + 2 * INT64
        groups = moe.num_groups * INT64 * 2 if moe.num_groups > 1 else 0
        return (scores + groups) / self.tensor

    def _experts(self) -> float:
        """Copies of a token for its experts."""
        model, parallel = self.config.model, self.config.parallel
        moe = model.moe
        # Tensor-parallel ranks share the tokens; expert-tensor ranks gather what their experts take.
        copies = self.imbalance * moe.top_k / self.tensor * parallel.expert_tensor
        width = moe.ffn_hidden_size / parallel.expert_tensor
        kept = self.operand * model.hidden_size + self._gated(width, "moe_act") + FP32
        indices = 3 * INT64 if not self.gpu else INT64
        return copies * (kept + indices)

    def hidden_states(self) -> float:
        """What a pipeline stage sends to the next."""
        return self.element * self.config.model.hidden_size / self.tensor

    def embedding(self) -> float:
        """The tokens themselves."""
        return INT64

    def mtp_inputs(self) -> float:
        """What goes into a multi-token layer, and its last norm."""
        width = self.config.model.hidden_size
        return (3 * self.norm(width) + self.operand * 2 * width) / self.tensor

    def mtp_head(self) -> float:
        """Hidden states of all tensor-parallel ranks that go through the head, in chunks that are computed again."""
        return self.element * self.config.model.hidden_size
