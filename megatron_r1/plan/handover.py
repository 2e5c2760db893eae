"""Seconds between sampling and training: weights to the servers, and memory that one of them leaves to the other."""

from __future__ import annotations

from megatron_r1.config.hardware import Gpu
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.chunks import chunks_of_ranks, parameters_of_rank
from megatron_r1.memory.parameters import mtp_layer, of_model
from megatron_r1.memory.trainer import dense_ranks, expert_ranks
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.serving import PINNED, RolloutStack, ServingConstants

BF16, OPTIMIZER = 2, 12
"""Bytes of a weight, and of its master weight and moments in fp32."""


def sync_seconds(config: RunConfig, gpu: Gpu, gpus: int, serving: ServingConstants, stack: RolloutStack) -> float:
    """Seconds of sending the weights to all servers; `gpus` is the trainer's number of GPUs.

    With method=group rank 0 of each pipeline stage broadcasts its stage's weights, one after the other (rollout/sync):
    all bytes pass through one network card. Colocated servers read them from their own GPU's memory; where every GPU
    gathers the whole model for its server, all bytes pass through each GPU's link.
    """
    held = of_model(config.model)
    if not config.rollout.weight_sync.include_mtp:
        held += mtp_layer(config.model) * -config.model.mtp.num_layers
    fp8 = config.rollout.sglang.server.quantization == "fp8"
    linear, element = (1 + 4 / 128**2) if fp8 else float(BF16), float(BF16)
    nbytes = linear * (held.shared + held.experts) + element * held.whole
    if config.rollout.weight_sync.method != "ipc":
        return nbytes / (serving.link * gpu.network)
    if stack.gathers_model:
        return nbytes / (serving.link * (gpu.network if gpus > gpu.nvlink_domain else gpu.nvlink))
    return nbytes / config.rollout.sglang.server.tensor_parallel / (serving.link * gpu.nvlink)


def reference_seconds(job: TrainingJob, stack: RolloutStack) -> float:
    """Seconds of exchanging the policy's weights for those of the reference, which are in host memory, and back."""
    return 3 * BF16 * _held(job)[0] / _copied(job.gpu, stack) if job.config.rl.kl_coefficient else 0.0


def memory_seconds(job: TrainingJob, stack: RolloutStack) -> float:
    """Seconds in which colocated trainers copy weights and optimizer to host memory, and back after sampling."""
    if job.config.rollout.placement != "colocated":
        return 0.0
    weights, share = _held(job)
    return 2 * (BF16 * weights + OPTIMIZER * share) / _copied(job.gpu, stack)


def _copied(gpu: Gpu, stack: RolloutStack) -> float:
    """Bytes/s between a GPU and host memory."""
    return stack.pageable_bytes or PINNED * gpu.host_link


def _held(job: TrainingJob) -> tuple[float, float]:
    """Weights on the fullest rank, and its share of the optimizer's, in numbers of parameters."""
    config = job.config
    held = (parameters_of_rank(chunks, config.model) for chunks in chunks_of_ranks(config.model, config.parallel))
    ranks = [(one.dense_of_rank(config.parallel), one.experts_of_rank(config.parallel)) for one in held]
    dense, experts = max(ranks, key=sum)
    return dense + experts, dense / dense_ranks(config, job.ranks) + experts / expert_ranks(config, job.ranks)
