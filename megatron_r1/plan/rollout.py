"""Seconds of a step of reinforcement learning: rollout, rewards, log-probabilities, update, and between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from megatron_r1.plan.constants import Constants
from megatron_r1.plan.decode import ServerGpus, rollout_seconds
from megatron_r1.plan.handover import memory_seconds, reference_seconds, sync_seconds
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.pipeline_time import simulated_step
from megatron_r1.plan.responses import Responses
from megatron_r1.plan.serving import RolloutStack, ServingConstants
from megatron_r1.plan.step import Counted, chunk_seconds, count


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """Seconds of a step's phases."""

    rollout: float
    rewards: float
    """Scoring after the last response, and the host's work on every response."""
    logprobs: float
    """Forward passes of the policy before the update, of reference and of the teacher."""
    update: float
    sync: float
    memory: float
    """Copies between the GPUs and host memory, where trainer and servers share GPUs."""
    ahead: bool
    """Whether the next rollout is sampled while the trainer trains."""
    in_flight: bool = False
    """Whether servers go on sampling while they receive weights."""

    @property
    def training(self) -> float:
        return self.logprobs + self.update

    @property
    def total(self) -> float:
        """Of a step: phases in turns, or the longer of sampling and training where one runs ahead of the other."""
        sampling, training = self.rollout + self.rewards, self.training + self.memory
        if not self.ahead:
            return sampling + training + self.sync
        if self.in_flight:
            return max(sampling, training + self.sync)
        return max(sampling, training) + self.sync

    @property
    def trainer_idle(self) -> float:
        """Share of a step in which the trainer waits."""
        return 1 - self.training / self.total

    @property
    def engine_idle(self) -> float:
        """Share of a step in which the servers wait."""
        return 1 - self.rollout / self.total


def responses_of(job: TrainingJob) -> Responses:
    """As the configuration has them."""
    plan, rl = job.config.plan, job.config.rl
    longest = job.config.rollout.max_response_tokens
    return Responses(
        rl.prompts_per_rollout * rl.group_size, min(longest, plan.response_tokens or longest / 2), longest,
        plan.prompt_tokens,
    )  # fmt: skip


def rl_step(
    job: TrainingJob,
    engines: ServerGpus,
    constants: Constants,
    responses: Responses | None = None,
    serving: ServingConstants | None = None,
    stack: RolloutStack | None = None,
) -> RolloutStep:
    """Seconds of a step of the verb grpo, whose trainer is `job`; `responses` as configured without."""
    config = job.config
    found, serving, stack = responses or responses_of(job), serving or ServingConstants(), stack or RolloutStack()
    update, forward = _passes(update_of(job, "grpo", found, stack), constants, stack)
    scored = (config.rl.old_logprobs_from == "trainer") + bool(config.rl.kl_coefficient)
    updates, each = config.rl.updates_per_rollout, found.number / job.data_parallel
    return RolloutStep(
        rollout_seconds(config, job.gpu, engines, found, constants, serving, stack),
        config.plan.reward_seconds + stack.response_seconds * found.number,
        scored * (forward * updates + stack.score_seconds * each) + reference_seconds(job, stack),
        config.rl.epochs_per_rollout * (update * updates + stack.loss_seconds * each),
        sync_seconds(config, job.gpu, job.ranks, serving, stack),
        memory_seconds(job, stack),
        config.rollout.max_staleness > 0,
        stack.in_flight,
    )


def _passes(update: TrainingJob, constants: Constants, stack: RolloutStack) -> tuple[float, float]:
    """Seconds of an update, and of a forward pass over its responses.

    With the dispatcher alltoall the host learns from the GPU how many tokens each expert gets, in every layer, and
    cannot launch kernels ahead: its seconds and the GPU's add up.
    """
    counted = count(update)
    config = update.config
    if not config.model.moe.num_experts or config.performance.moe_token_dispatcher_type != "alltoall":
        return _update_and_forward(counted, constants)
    of_gpu, forward_of_gpu = _update_and_forward(counted, replace(constants, launch=0.0))
    most = 1e12  # so fast that only the host's launches take time, and what no constant decides
    host = replace(constants, matrix=most, attention=most, memory=most, link=most)
    launched, forward_launched = _update_and_forward(
        counted, replace(host, launch=constants.launch * update.gpu.host_slowness)
    )
    other, forward_other = _update_and_forward(counted, replace(host, launch=0.0))
    return of_gpu + launched - other, forward_of_gpu + (forward_launched - forward_other) / stack.scored_together


def _update_and_forward(counted: Counted, constants: Constants) -> tuple[float, float]:
    """Seconds of an update, and of its forward passes."""
    step = simulated_step(counted, constants)
    return step.total, (step.compute + step.exchange + step.bubble) * _forward_share(counted, constants)


def _forward_share(counted: Counted, constants: Constants) -> float:
    """Share of the forward pass in the seconds of a micro-batch."""
    passes = [
        [one.compute + one.exchange for one in (chunk.forward, chunk.backward_input, chunk.backward_weight)]
        for chunks in chunk_seconds(counted, constants)
        for chunk in chunks
    ]
    total = sum(map(sum, passes))
    return sum(one[0] for one in passes) / total if total else 0.0


def update_of(
    job: TrainingJob, verb: str, responses: Responses | None = None, stack: RolloutStack | None = None
) -> TrainingJob:
    """One optimizer update as training of sequences: of grpo, responses that lie end to end in micro-batches of at most
    rl.tokens_per_micro_batch tokens; of other verbs the job itself.
    """
    if verb != "grpo":
        return job
    config, stack = job.config, stack or RolloutStack()
    found = responses or responses_of(job)
    budget, updates = config.rl.tokens_per_micro_batch, config.rl.updates_per_rollout
    filled = found.micro_batches(budget, stack.packing)
    each = budget if stack.padded and config.parallel.pipeline > 1 else min(budget, ceil(found.tokens / filled))
    number = max(1, ceil(filled / updates / job.data_parallel)) * job.data_parallel
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
