"""Seconds of a step of reinforcement learning: rollout, rewards, log-probabilities, update and weight sync.

A rollout is decoded by continuous batching: all responses start together, and the batch shrinks as the short ones end.
The longest decide when it is over, so lengths count with their distribution, not with their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, exp
from statistics import NormalDist

from megatron_r1.config.hardware import Gpu
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.engine import WEIGHT_AND_CACHE, cache_bytes_per_token, engine_weights
from megatron_r1.memory.parameters import mtp_layer, of_model
from megatron_r1.memory.trainer import GB
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.pipeline_time import simulated_step
from megatron_r1.plan.step import count

SPREAD = 0.7
"""Standard deviation of the logarithm of a response's length: lengths of reasoning models are about log-normal."""
REPLAYED = 0.1
"""A kernel of a captured CUDA graph, against one that the host launches (constants.launch): unverified."""
KERNELS_PER_LAYER = 30
"""Kernels of a decoding step through one layer."""
POINTS = 48
"""Steps of the integral over a rollout."""


@dataclass(frozen=True, slots=True)
class ServerGpus:
    """The servers: GPUs, and GPUs of one server."""

    gpus: int
    tensor: int

    @property
    def servers(self) -> int:
        return max(1, self.gpus // self.tensor)


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """Seconds of a step's phases."""

    rollout: float
    rewards: float
    logprobs: float
    """Forward passes of the policy before the update, of reference and of the teacher."""
    update: float
    sync: float
    ahead: bool
    """Whether the next rollout is sampled while the trainer trains."""

    @property
    def training(self) -> float:
        return self.logprobs + self.update

    @property
    def total(self) -> float:
        """Of a step: phases in turns, or the longer of sampling and training where one runs ahead of the other."""
        if self.ahead:
            return max(self.rollout + self.rewards, self.training) + self.sync
        return self.rollout + self.rewards + self.training + self.sync

    @property
    def trainer_idle(self) -> float:
        """Share of a step in which the trainer waits."""
        return 1 - self.training / self.total

    @property
    def engine_idle(self) -> float:
        """Share of a step in which the servers wait."""
        return 1 - self.rollout / self.total


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses of a rollout."""

    number: int
    mean: float
    longest: int
    prompt: float
    """Mean tokens of a prompt."""

    def lengths(self) -> list[float]:
        """Quantiles of the lengths: log-normal with the mean, cut off at the longest."""
        middle, normal = self.mean / exp(SPREAD**2 / 2), NormalDist()
        found = [middle * exp(SPREAD * normal.inv_cdf((point + 0.5) / POINTS)) for point in range(POINTS)]
        factor = 1.0
        for _ in range(8):  # cutting off lowers the mean, which is given
            factor *= self.mean * POINTS / sum(min(self.longest, factor * one) for one in found)
        return [min(self.longest, factor * one) for one in found]


def responses_of(config: RunConfig) -> Responses:
    """As the configuration has them."""
    plan, rl = config.plan, config.rl
    longest = config.rollout.max_response_tokens
    return Responses(
        rl.prompts_per_rollout * rl.group_size, min(longest, plan.response_tokens or longest / 2), longest,
        plan.prompt_tokens,
    )  # fmt: skip


def decode_seconds(
    config: RunConfig, gpu: Gpu, engines: ServerGpus, batch: float, context: float, constants: Constants
) -> float:
    """Seconds of one decoding step of a server with `batch` sequences of `context` tokens each.

    All weights that the batch visits are read once, and the whole cache; each token costs its FLOPs.
    """
    model, each = config.model, cache_bytes_per_token(config.model, config.rollout)
    weights = engine_weights(model, config.rollout)
    held = of_model(model)
    if model.moe.num_experts:
        visited = 1 - (1 - model.moe.top_k / model.moe.num_experts) ** batch
        weights *= 1 - (1 - visited) * held.experts / held.total
    fp8 = config.rollout.sglang.server.quantization == "fp8"
    rate = constants.matrix * (gpu.fp8 if fp8 else gpu.bf16) * gpu.sustained
    moved = (weights + batch * context * each) / (constants.memory * gpu.memory_bandwidth)
    arithmetic = 2 * _active(config) * batch / engines.tensor / rate
    sent = 4 * batch * model.hidden_size * 2 * model.num_layers * (engines.tensor > 1) / (constants.link * gpu.nvlink)
    kernels = KERNELS_PER_LAYER * model.num_layers * constants.launch * REPLAYED
    return moved + arithmetic + sent + kernels


def rollout_seconds(
    config: RunConfig, gpu: Gpu, engines: ServerGpus, responses: Responses, constants: Constants
) -> float:
    """Seconds until the last response of a rollout is there.

    A server that has no room for the caches of all its responses takes them in turns.
    """
    lengths = responses.lengths()
    share = responses.number / engines.servers
    room = _cache_tokens(config, gpu)
    found, previous = 0.0, 0.0
    for index, length in enumerate(lengths):
        batch = share * (1 - index / len(lengths))
        context = responses.prompt + (previous + length) / 2
        turns = max(1.0, batch * context / room)
        step = decode_seconds(config, gpu, engines, max(1.0, batch / turns), context, constants)
        found += (length - previous) * step * turns
        previous = length
    prompts = responses.number / max(1, config.rl.group_size) * responses.prompt  # one prefill serves a group
    flops = 2 * prompts * _active(config)
    return found + flops / engines.gpus / (constants.matrix * gpu.bf16 * gpu.sustained)


def _active(config: RunConfig) -> float:
    """Parameters that a token visits."""
    held, moe = of_model(config.model), config.model.moe
    return held.total - held.experts * (1 - moe.top_k / max(1, moe.num_experts))


def _cache_tokens(config: RunConfig, gpu: Gpu) -> float:
    """Tokens in the cache of a rank."""
    server = config.rollout.sglang.server
    share = server.memory_fraction or WEIGHT_AND_CACHE
    left = share * gpu.memory_gb * GB - engine_weights(config.model, config.rollout)
    return max(1.0, left / cache_bytes_per_token(config.model, config.rollout))


def sync_seconds(config: RunConfig, gpu: Gpu, constants: Constants) -> float:
    """Seconds of sending the weights to all servers.

    Rank 0 of each pipeline stage broadcasts its stage's weights, one after the other (rollout/sync): all bytes pass
    through one network card. Colocated servers read them from their own GPU's memory.
    """
    held = of_model(config.model)
    if not config.rollout.weight_sync.include_mtp:
        held += mtp_layer(config.model) * -config.model.mtp.num_layers
    fp8 = config.rollout.sglang.server.quantization == "fp8"
    linear, element = (1 + 4 / 128**2) if fp8 else 2.0, 2.0
    nbytes = linear * (held.shared + held.experts) + element * held.whole
    if config.rollout.weight_sync.method == "ipc":
        return nbytes / config.rollout.sglang.server.tensor_parallel / (constants.link * gpu.nvlink)
    return nbytes / (constants.link * gpu.network)


def rl_step(
    job: TrainingJob, engines: ServerGpus, constants: Constants, responses: Responses | None = None
) -> RolloutStep:
    """Seconds of a step of the verb grpo, whose trainer is `job`; `responses` as configured without."""
    config = job.config
    found = responses or responses_of(config)
    update = simulated_step(count(update_of(job, "grpo", found)), constants)
    # A forward pass is a third of an update: the backward pass has twice the products.
    forward = (update.compute + update.exchange + update.bubble) / 3
    scored = (config.rl.old_logprobs_from == "trainer") + bool(config.rl.kl_coefficient)
    updates = config.rl.updates_per_rollout
    return RolloutStep(
        rollout_seconds(config, job.gpu, engines, found, constants),
        config.plan.reward_seconds,
        forward * updates * scored,
        update.total * updates * config.rl.epochs_per_rollout,
        sync_seconds(config, job.gpu, constants),
        config.rollout.max_staleness > 0,
    )


def update_of(job: TrainingJob, verb: str, responses: Responses | None = None) -> TrainingJob:
    """One optimizer update as training of sequences: of grpo, responses that lie end to end in micro-batches of
    rl.tokens_per_micro_batch tokens; of other verbs the job itself.
    """
    if verb != "grpo":
        return job
    config = job.config
    found = responses or responses_of(config)
    tokens = found.number * (found.prompt + found.mean) / config.rl.updates_per_rollout
    each = config.rl.tokens_per_micro_batch
    number = max(1, ceil(tokens / each / job.data_parallel)) * job.data_parallel
    ramp = replace(config.train.schedule.batch_ramp, tokens=0)
    train = replace(
        config.train,
        micro_batch_size=1,
        sequence_length=each,
        global_batch_size=number,
        schedule=replace(config.train.schedule, batch_ramp=ramp),
    )
    model = replace(config.model, mtp=replace(config.model.mtp, num_layers=0))  # trained in pretrain and sft alone
    attended = (found.prompt + found.mean) / each
    return replace(job, config=replace(config, train=train, model=model), attended=min(1.0, attended))


def engines_of(config: RunConfig, gpu: Gpu, gpus: int) -> ServerGpus:
    """Servers on so many GPUs: each as small as its weights and two responses of full length allow."""
    server = config.rollout.sglang.server
    tensor = server.tensor_parallel
    while tensor < gpus:
        changed = replace(server, tensor_parallel=tensor)
        rollout = replace(config.rollout, sglang=replace(config.rollout.sglang, server=changed))
        if _cache_tokens(replace(config, rollout=rollout), gpu) > 2 * config.model.max_sequence_length:
            break
        tensor *= 2
    return ServerGpus(gpus, tensor)


def with_engines(config: RunConfig, engines: ServerGpus) -> RunConfig:
    """The configuration with servers of this size."""
    server = replace(config.rollout.sglang.server, tensor_parallel=engines.tensor)
    return replace(config, rollout=replace(config.rollout, sglang=replace(config.rollout.sglang, server=server)))
