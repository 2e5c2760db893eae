"""The pipeline of a job, simulated event by event with the seconds of its passes."""

from __future__ import annotations

from dataclasses import replace

from megatron_r1.config.pipeline_stages import fitting_group_size
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.exchange import NETWORK_SHARE, NVLINK_SHARE
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.pipeline.orders import ScheduleShape
from megatron_r1.plan.pipeline.simulate import Durations
from megatron_r1.plan.pipeline.steady import step_seconds
from megatron_r1.plan.step import ChunkSeconds, Counted, Seconds, StepTime, chunk_seconds, overlaps, pair, step_time


def schedule_of(job: TrainingJob) -> ScheduleShape:
    """The order of a job's passes."""
    degrees, passes = job.config.parallel, job.micro_batches
    if job.stack.schedule == "DualPipe":
        return ScheduleShape("dualpipe", degrees.pipeline, passes)
    if degrees.virtual_pipeline == 1:
        return ScheduleShape("1f1b", degrees.pipeline, passes)
    group = fitting_group_size(degrees.microbatch_group_size_per_vp_stage, degrees.pipeline, passes) or 0
    return ScheduleShape(
        "interleaved", degrees.pipeline, passes, degrees.virtual_pipeline, group, overlapped=overlaps(job)
    )


def durations_of(counted: Counted, constants: Constants) -> Durations:
    """Seconds of the passes through each stage, first to last, and of sending between ranks."""
    job, ranks = counted.job, chunk_seconds(counted, constants)
    degrees = job.config.parallel
    stages = [ranks[stage % degrees.pipeline][stage // degrees.pipeline] for stage in range(degrees.stages)]
    sent = 2 * job.tokens * job.config.model.hidden_size / degrees.tensor
    near = degrees.tensor * degrees.pipeline <= job.gpu.nvlink_domain and job.ranks <= job.gpu.nvlink_domain
    return Durations(
        [_whole(stage.forward) for stage in stages],
        [_whole(stage.backward_input) for stage in stages],
        [_whole(stage.backward_weight) for stage in stages],
        p2p=sent / (NVLINK_SHARE * job.gpu.nvlink if near else NETWORK_SHARE * job.gpu.network),
        # DualPipe's open implementation waits for what it sends and receives before the next pass (DualPipe.step).
        p2p_overlaps=job.stack.schedule != "DualPipe",
        overlap_saves=[_saved(stage, job) for stage in stages] if overlaps(job) else (),
    )


def simulated_step(counted: Counted, constants: Constants) -> StepTime:
    """As `step_time`, with the simulated schedule in place of the closed formula for waiting.

    Raises:
        ValueError: the schedule needs another number of ranks or micro-batches.
    """
    found = step_time(counted, constants)
    if counted.job.config.parallel.pipeline == 1:
        return found
    passes = step_seconds(schedule_of(counted.job), durations_of(counted, constants))
    return replace(found, bubble=max(0.0, passes - found.compute - found.exchange))


def _whole(one: Seconds) -> float:
    return one.compute + one.exchange


def _saved(stage: ChunkSeconds, job: TrainingJob) -> float:
    """Seconds that overlapping saves where a forward and a backward pass of a stage run together."""
    backward = stage.backward_input + stage.backward_weight
    return _whole(stage.forward) + _whole(backward) - sum(pair(stage.forward, backward, job))
