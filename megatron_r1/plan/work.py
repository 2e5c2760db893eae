"""What a pass through one layer does on one rank: FLOPs, bytes in memory, bytes on links, kernels.

Everything is per micro-batch of a rank, counted from the shapes of the matrices. A matrix product is charged both its
FLOPs and its bytes, so that small ones take longer than their share of the peak: with an intensity of i FLOPs a byte it
reaches peak / (1 + ridge / i), ridge being the machine's peak / bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import sqrt
from operator import add, attrgetter

from megatron_r1.config.model import AttentionConfig, GroupedAttentionConfig, ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.plan.exchange import Traffic

BF16, FP8, FP32 = 2, 1, 4
QUANTISE = 2 * BF16
"""Bytes per number of a linear layer's input that FP8 adds: it is read once and written by rows and by columns."""
UNNAMED = 20
"""Kernels of a layer's forward pass that copy, cast and fill, beside those that are named below; twice as many
backward. A profile of Qwen3-30B-A3B in bf16 with 8 experts a rank counts 463,348 in 64 micro-batches of 48 layers: 151
a layer without the router's, which a CUDA graph launches (Megatron-Bridge,
skills/nemo-mbridge-perf-expert-parallel-overlap). 92 of them are named."""
IN_A_LOOP = 0.25
"""Host's time for a kernel that a loop within one call launches, over that of other kernels: they follow each other in
8 us, where the median is 30 (first decile and median of launches in DeepSeek's trace, deepseek-ai/profile-data)."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass does."""

    bf16: float = 0.0
    """FLOPs in bf16."""
    fp8: float = 0.0
    """FLOPs in FP8."""
    scores_bf16: float = 0.0
    """FLOPs of attention's own products in bf16."""
    scores_fp8: float = 0.0
    """The same in FP8."""
    memory: float = 0.0
    """Bytes read and written in the GPU's memory."""
    tensor: float = 0.0
    """Bytes that a rank sends to the ranks that share its matrices."""
    expert_network: float = 0.0
    """Bytes of tokens that a rank sends to experts outside of its NVLink domain."""
    expert_nvlink: float = 0.0
    """Bytes of tokens that a rank sends to experts in its NVLink domain."""
    kernels: float = 0.0
    """Kernels that the host launches ahead of the GPU."""
    awaited: float = 0.0
    """Kernels for which the GPU waits."""

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, _AMOUNTS(self), _AMOUNTS(other)))  # a search adds some 10^5 times

    def __mul__(self, times: float) -> Work:
        return Work(*(one * times for one in _AMOUNTS(self)))

    def behind_routing(self) -> Work:
        """With a host that learns from the GPU how many tokens each expert has, and so cannot run ahead of it."""
        return replace(self, kernels=0.0, awaited=self.awaited + self.kernels)


_AMOUNTS = attrgetter(*(item.name for item in fields(Work)))


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Of one layer, or of several."""

    forward: Work = Work()
    backward_input: Work = Work()
    """Gradients of inputs, and what is computed again before them."""
    backward_weight: Work = Work()

    def __add__(self, other: LayerWork) -> LayerWork:
        return LayerWork(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )

    def __mul__(self, times: float) -> LayerWork:
        return LayerWork(self.forward * times, self.backward_input * times, self.backward_weight * times)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes by which work is counted."""

    config: RunConfig
    tokens: float
    """Tokens of a micro-batch on one rank, before tensor-parallel ranks share them."""
    length: float
    """Tokens of a sequence."""
    traffic: Traffic
    """How far the experts' exchange goes."""
    imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean."""
    fp8_attention: bool = False
    """Whether attention multiplies in FP8."""
    gradient: int = FP32
    """Bytes of a gradient to which micro-batches add theirs."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor

    def recomputes(self, name: str) -> bool:
        """Whether a module is computed again in the backward pass."""
        return name in self.config.performance.recompute_modules

    def product(self, tokens: float, inner: float, outer: float, matrices: float = 1.0) -> LayerWork:
        """A linear layer: `tokens` rows, of which each matrix has its share, times an inner x outer matrix."""
        fp8 = self.config.fp8.enabled
        flops, element = 2 * tokens * inner * outer, FP8 if fp8 else BF16
        weights = matrices * inner * outer
        moved = tokens * (element * inner + BF16 * outer) + element * weights
        back = tokens * (element * outer + BF16 * inner) + element * weights
        summed = element * tokens * (inner + outer) + 2 * self.gradient * weights  # the gradient is read and written
        quantised = QUANTISE * tokens if fp8 else 0.0

        def work(memory: float) -> Work:
            # A product for each expert, and in FP8 two kernels that quantise its rows.
            kernels = 1 + IN_A_LOOP * (matrices - 1)
            kernels *= 3 if fp8 else 1
            return Work(0.0 if fp8 else flops, flops if fp8 else 0.0, memory=memory, kernels=kernels)

        return LayerWork(work(moved + quantised * inner), work(back + quantised * outer), work(summed))

    def elementwise(self, numbers: float, kernels: float = 1) -> LayerWork:
        """Operators that read and write this many bf16 numbers in the forward pass, and twice as many backward."""
        return LayerWork(Work(memory=BF16 * numbers, kernels=kernels), Work(memory=2 * BF16 * numbers, kernels=kernels))

    def gathered(self, times: int) -> LayerWork:
        """Collectives of tensor-parallel ranks over all hidden states, as many in each direction."""
        share = (self.tensor - 1) / self.tensor
        sent = Work(tensor=times * BF16 * self.tokens * self.model.hidden_size * share, kernels=times * (share > 0))
        return LayerWork(sent, sent)


def attention_of(sizes: Sizes) -> LayerWork:
    """Attention with its norm, projections and residual."""
    model, tokens = sizes.model, sizes.tokens
    width, heads, of = model.hidden_size, model.num_attention_heads / sizes.tensor, model.attention
    norms = sizes.elementwise(tokens / sizes.tensor * width * 2) * 1
    work = norms + sizes.elementwise(tokens / sizes.tensor * width * 3) + sizes.gathered(2)
    work += LayerWork(Work(kernels=UNNAMED), Work(kernels=2 * UNNAMED))
    if isinstance(of, GroupedAttentionConfig):
        query = value = of.head_dim
        keys = of.num_key_value_heads / sizes.tensor
        work += sizes.product(tokens, width, (heads + 2 * keys) * query)
        work += sizes.elementwise(tokens * (heads + keys) * query * (4 if of.qk_norm else 2), 4)
        up = LayerWork()
    else:
        query, value = of.qk_nope_head_dim + of.qk_rope_head_dim, of.v_head_dim
        work += _latents(sizes, of)
        up = sizes.product(tokens, of.q_lora_rank or width, heads * query) if of.q_lora_rank else LayerWork()
        work += LayerWork() if of.q_lora_rank else sizes.product(tokens, width, heads * query)
        up += sizes.product(tokens, of.kv_lora_rank, heads * (of.qk_nope_head_dim + value))
        up += sizes.elementwise(tokens * heads * (4 * query + 2 * value), 4)  # rotary positions, keys put together
    # Half of all pairs under causal attention; the backward pass computes the scores again (FlashAttention-2).
    core = 2 * tokens * sizes.length * heads * (query + value) / 2
    bytes_of_core = BF16 * tokens * heads * (2 * query + 2 * value)
    in_bf16, in_fp8 = (0.0, core) if sizes.fp8_attention else (core, 0.0)
    forward = Work(scores_bf16=in_bf16, scores_fp8=in_fp8, memory=bytes_of_core, kernels=1)
    scores = LayerWork(forward, forward * 2.5)
    work += up + scores + sizes.product(tokens, heads * value, width)
    again = up.forward if sizes.recomputes("mla_up_proj") else Work()
    again += scores.forward if sizes.recomputes("core_attn") else Work()
    again += norms.forward if sizes.recomputes("layernorm") else Work()
    return work + LayerWork(backward_input=again)


def _latents(sizes: Sizes, of: AttentionConfig) -> LayerWork:
    """Down-projections, which tensor-parallel ranks do for their own tokens, and the latents' norms."""
    tokens = sizes.tokens / sizes.tensor
    down = of.kv_lora_rank + of.qk_rope_head_dim + of.q_lora_rank
    return sizes.product(tokens, sizes.model.hidden_size, down) + sizes.elementwise(tokens * 2 * down, 3)


def gated(sizes: Sizes, tokens: float, width: float, matrices: float = 1.0) -> tuple[LayerWork, LayerWork]:
    """A gated feed-forward, and of that the activation alone."""
    hidden = sizes.model.hidden_size
    activation = sizes.elementwise(tokens * 3 * width)
    products = sizes.product(tokens, hidden, 2 * width, matrices) + sizes.product(tokens, width, hidden, matrices)
    return products + activation, activation


def dense_layer(sizes: Sizes, attention: LayerWork) -> LayerWork:
    """A layer without experts."""
    feed_forward, _ = gated(sizes, sizes.tokens, sizes.model.ffn_hidden_size / sizes.tensor)
    rest = sizes.elementwise(sizes.tokens / sizes.tensor * sizes.model.hidden_size * 5, 2)
    work = attention + feed_forward + rest + sizes.gathered(2)
    return work + LayerWork(backward_input=feed_forward.forward if sizes.recomputes("mlp") else Work())


def sparse_layer(sizes: Sizes, attention: LayerWork) -> LayerWork:
    """A layer with experts."""
    moe, tokens, hidden = sizes.model.moe, sizes.tokens / sizes.tensor, sizes.model.hidden_size
    work = attention + sizes.elementwise(tokens * hidden * 5, 2)
    if moe.num_shared_experts:
        shared, _ = gated(sizes, sizes.tokens, moe.num_shared_experts * moe.ffn_hidden_size / sizes.tensor)
        work += shared + sizes.gathered(2)
        work += LayerWork(backward_input=shared.forward if sizes.recomputes("shared_experts") else Work())
    routed = _routed(sizes, tokens)
    work += routed + LayerWork(backward_input=routed.forward.behind_routing() if sizes.recomputes("moe") else Work())
    return replace(work, forward=work.forward.behind_routing())


def _routed(sizes: Sizes, tokens: float) -> LayerWork:
    """Router, exchange and routed experts; `tokens` of this rank, before they are copied for experts."""
    moe, parallel, hidden = sizes.model.moe, sizes.config.parallel, sizes.model.hidden_size
    work = sizes.elementwise(tokens * moe.num_experts * 8, 8)  # scores in fp32, and choices
    work += sizes.elementwise(tokens * hidden * 2 + 2 * tokens * hidden * moe.top_k, 4)  # sorted, and summed again
    copies = tokens * moe.top_k * parallel.expert_tensor * sizes.imbalance
    if sizes.traffic.quantised and sizes.config.fp8.enabled:  # each token before it is copied, not each copy after
        saved = Work(memory=-QUANTISE * (copies - tokens) * hidden)
        work += LayerWork(saved, saved)
    experts, activation = gated(
        sizes, copies, moe.ffn_hidden_size / parallel.expert_tensor, moe.num_experts / parallel.expert
    )
    again = activation.forward if sizes.recomputes("moe_act") else Work()
    sent = _sent(sizes, tokens)
    return work + experts + LayerWork(sent, sent + again)


def _sent(sizes: Sizes, tokens: float) -> Work:
    """Tokens to their experts and back: as many as the busiest rank, or the busiest NVLink domain, receives."""
    traffic, each = sizes.traffic, tokens * sizes.model.hidden_size * sizes.traffic.element
    return Work(
        expert_network=traffic.network * each * (1 + (sizes.imbalance - 1) / sqrt(traffic.domain)),
        expert_nvlink=traffic.nvlink * each * sizes.imbalance,
        kernels=4,
    )


def mtp_layer(sizes: Sizes, sparse: LayerWork) -> LayerWork:
    """A multi-token layer, without its output head."""
    hidden = sizes.model.hidden_size
    return sparse + sizes.product(sizes.tokens / sizes.tensor, 2 * hidden, hidden)


def head(sizes: Sizes) -> LayerWork:
    """The output head, in bf16, and the loss over the vocabulary in fp32."""
    columns, hidden, tokens = sizes.model.vocab_size / sizes.tensor, sizes.model.hidden_size, sizes.tokens
    flops, moved = 2 * tokens * hidden * columns, BF16 * (tokens * (hidden + columns) + hidden * columns)
    product = Work(flops, memory=moved, kernels=1)
    summed = Work(flops, memory=moved + 2 * sizes.gradient * hidden * columns, kernels=1)
    return LayerWork(product, product, summed) + sizes.elementwise(tokens * columns * 5, 6)


def parts(sizes: Sizes) -> Iterator[tuple[str, LayerWork]]:
    """Each kind of layer with its work."""
    attention = attention_of(sizes)
    yield "dense", dense_layer(sizes, attention)
    if sizes.model.moe.num_experts:
        sparse = sparse_layer(sizes, attention)
        yield "sparse", sparse
        yield "mtp", mtp_layer(sizes, sparse)
    yield "head", head(sizes)
