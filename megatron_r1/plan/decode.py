"""Seconds of a rollout: servers decode all responses by continuous batching, until the longest one ends.

A decoding step reads the weights that its sequences visit, and their caches; it multiplies; it adds up partial results
between the server's GPUs, twice a layer; its kernels take a while each, however small; and the host prepares it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from megatron_r1.config.hardware import Gpu
from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.engine import WEIGHT_AND_CACHE, cache_bytes_per_token, engine_weights
from megatron_r1.memory.parameters import of_model
from megatron_r1.memory.parts import GB
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.responses import Responses
from megatron_r1.plan.serving import RolloutStack, ServingConstants

POINTS = 48
"""Steps of the integral over a rollout."""
GROUPED, LATENT, DENSE, SPARSE, SHARED = 6, 13, 4, 10, 4
"""Kernels of a decoding step in one layer, counted by hand: of grouped and of latent attention, of a dense
feed-forward, of routed and of shared experts, each with its norm."""


@dataclass(frozen=True, slots=True)
class ServerGpus:
    """The servers: GPUs, and GPUs of one server."""

    gpus: int
    tensor: int

    @property
    def servers(self) -> int:
        return max(1, self.gpus // self.tensor)


def kernels(model: ModelConfig) -> int:
    """Kernels of a decoding step."""
    moe, attention = model.moe, model.attention
    if isinstance(attention, GroupedAttentionConfig):
        each = GROUPED + attention.qk_norm
    else:
        each = LATENT
    sparse = model.num_layers - moe.first_dense_layers if moe.num_experts else 0
    experts = SPARSE + SHARED * (moe.num_shared_experts > 0)
    return each * model.num_layers + experts * sparse + DENSE * (model.num_layers - sparse)


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Decoding steps of one server; bytes and parameters are those of one of its GPUs."""

    weights: float
    """Bytes of weights outside of routed experts."""
    experts: float
    """Bytes of weights in routed experts."""
    visited: float
    """Share of the experts that a token visits."""
    cache: float
    """Bytes of the cache per token."""
    parameters: float
    """Parameters that a token visits."""
    bandwidth: float
    """Bytes/s of memory."""
    rate: float
    """FLOP/s of matrix products."""
    fixed: float
    """Seconds of the GPU that do not depend on the batch: small kernels, and the latency of all-reduces."""
    sent: float
    """Seconds of sending one token's partial results."""
    host: float
    """Seconds of the host for a step."""
    host_sequence: float
    """Seconds of the host for each sequence of a step."""
    hides_host: bool

    def seconds(self, batch: float, context: float) -> float:
        """Seconds of one step with `batch` sequences of `context` tokens each."""
        of_experts: float = 1 - (1 - self.visited) ** batch  # share of the experts
        read = self.weights + self.experts * of_experts + batch * context * self.cache
        device = read / self.bandwidth + batch * (2 * self.parameters / self.rate + self.sent) + self.fixed
        host = self.host + self.host_sequence * batch
        return max(device, host) if self.hides_host else device + host


def decoder(
    config: RunConfig, gpu: Gpu, tensor: int, constants: Constants, serving: ServingConstants, stack: RolloutStack
) -> DecodeCost:
    """A server of `tensor` GPUs."""
    model, server = config.model, config.rollout.sglang.server
    moe, held, weights = model.moe, of_model(model), engine_weights(model, config.rollout)
    experts = held.experts / held.total
    # Without CUDA graphs the host launches each kernel, and the GPU waits for it.
    kernel = serving.kernel if server.cuda_graph else max(serving.kernel, constants.launch * gpu.host_slowness)
    latency, token = _all_reduce(gpu, tensor, 2 * model.hidden_size, serving)
    peak = gpu.fp8 if server.quantization == "fp8" else gpu.bf16
    return DecodeCost(
        weights * (1 - experts),
        weights * experts,
        moe.top_k / max(1, moe.num_experts),
        cache_bytes_per_token(model, config.rollout),
        active_parameters(model) / tensor,
        serving.memory * gpu.memory_bandwidth,
        constants.matrix * peak * gpu.sustained,
        kernels(model) * kernel + 2 * model.num_layers * latency,
        2 * model.num_layers * token,
        serving.step,
        serving.sequence,
        stack.hides_host,
    )


def _all_reduce(gpu: Gpu, tensor: int, nbytes: float, serving: ServingConstants) -> tuple[float, float]:
    """Seconds in which a server's GPUs add up partial results: for any message, and for each token of `nbytes`."""
    if tensor == 1:
        return 0.0, 0.0
    near, far = min(tensor, gpu.nvlink_domain), tensor > gpu.nvlink_domain
    latency = serving.near_hop * log2(near) if near <= gpu.per_node else serving.between_nodes
    latency += serving.network * log2(tensor / near)
    bandwidth = gpu.network * gpu.per_node if far else gpu.nvlink
    return latency, 2 * nbytes * (tensor - 1) / tensor / (serving.link * bandwidth)


def active_parameters(model: ModelConfig) -> float:
    """Parameters that a token visits."""
    held, moe = of_model(model), model.moe
    return held.total - held.experts * (1 - moe.top_k / max(1, moe.num_experts))


def rollout_seconds(
    config: RunConfig,
    gpu: Gpu,
    engines: ServerGpus,
    responses: Responses,
    constants: Constants,
    serving: ServingConstants,
    stack: RolloutStack,
) -> float:
    """Seconds until the last response of a rollout is there.

    All responses start together, and the batch shrinks as the short ones end. A server that has no room for the caches
    of all its responses takes them in turns.
    """
    server = decoder(config, gpu, engines.tensor, constants, serving, stack)
    share, room = responses.number / engines.servers, cache_tokens(config, gpu)
    found, length, left = 0.0, 0.0, 1.0
    for index in range(1, POINTS + 1):
        # The number that is left falls by the same factor from one point to the next, down to a single response.
        following = responses.number ** (-index / POINTS)
        until = responses.length_at(1 - following)
        batch, context = share * (left * following) ** 0.5, responses.prompt + (length + until) / 2
        turns = max(1.0, batch * context / room)
        found += (until - length) * turns * server.seconds(max(1.0, batch / turns), context)
        length, left = until, following
    prompts = responses.number / max(1, config.rl.group_size) * responses.prompt  # one prefill serves a group
    return found + 2 * prompts * server.parameters * engines.tensor / engines.gpus / server.rate


def cache_tokens(config: RunConfig, gpu: Gpu) -> float:
    """Tokens for which a rank has room in its cache."""
    share = config.rollout.sglang.server.memory_fraction or WEIGHT_AND_CACHE
    left = share * gpu.memory_gb * GB - engine_weights(config.model, config.rollout)
    return max(1.0, left / cache_bytes_per_token(config.model, config.rollout))


def engines_of(config: RunConfig, gpu: Gpu, gpus: int) -> ServerGpus:
    """Servers on so many GPUs: each as small as its weights and two responses of full length allow."""
    tensor = config.rollout.sglang.server.tensor_parallel
    while 2 * tensor <= gpus:
        sized = with_engines(config, ServerGpus(gpus, tensor))
        if cache_tokens(sized, gpu) > 2 * config.model.max_sequence_length:
            break
        tensor *= 2
    return ServerGpus(gpus, tensor)


def with_engines(config: RunConfig, engines: ServerGpus) -> RunConfig:
    """The configuration with servers of this size."""
    server = replace(config.rollout.sglang.server, tensor_parallel=engines.tensor)
    return replace(config, rollout=replace(config.rollout, sglang=replace(config.rollout.sglang, server=server)))
