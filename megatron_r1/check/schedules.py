"""Checks of schedules and of the counts that a rollout divides."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_r1.check.finding import Check, Finding, Job, passed, refused, warning
from megatron_r1.config.keys import reads
from megatron_r1.config.train import TrainConfig


def consumed_tokens(train: TrainConfig) -> int:
    """Tokens that a pre-training run consumes in all its steps, the growing batch included."""
    ramp, sizes, tokens, steps = train.schedule.batch_ramp, train.batch_sizes(), 0, 0
    for number, size in enumerate(sizes[:-1], 1):
        until = -(-ramp.tokens * number // (len(sizes) - 1))  # first count of tokens with the next size
        needed = max(0, -(-(until - tokens) // (size * train.sequence_length)))
        at_size = min(needed, train.steps - steps)
        tokens, steps = tokens + at_size * size * train.sequence_length, steps + at_size
    return tokens + (train.steps - steps) * train.global_batch_size * train.sequence_length


def _ramp(job: Job) -> Iterator[Finding]:
    """The increments themselves are checked as the configuration is read, and against ranks with the batch."""
    train = job.config.train
    ramp, budget = train.schedule.batch_ramp, consumed_tokens(train)
    if ramp.tokens and ramp.tokens > budget:
        yield refused(
            f"train.schedule.batch_ramp.tokens={ramp.tokens:,}: the run consumes {budget:,} tokens, so the batch never "
            "reaches train.global_batch_size",
            f"take at most {budget:,}, or more train.steps",
        )
    elif ramp.tokens:
        yield passed(f"{ramp.start} to {train.global_batch_size} sequences in {len(train.batch_sizes()) - 1} increases")


def _phases(job: Job) -> Iterator[Finding]:
    schedule, budget = job.config.train.schedule, consumed_tokens(job.config.train)
    for name in ("learning_rate_phases", "mtp_weight_phases", "bias_rate_phases"):
        phases = getattr(schedule, name)
        if not phases:
            continue
        begin = phases[-2].until if len(phases) > 1 else 0
        if begin >= budget:
            yield refused(
                f"train.schedule.{name}: the last phase begins at {begin:,} tokens, and the run ends after {budget:,}",
                "take more train.steps, or phases within the run's tokens",
            )
        elif phases[-1].until > budget:
            yield warning(
                f"train.schedule.{name}: its last phase ends at {phases[-1].until:,} tokens, the run after {budget:,}",
                f"train.steps={_steps_to(job.config.train, phases[-1].until)} reaches its end",
            )
    yield passed(f"{budget:,} tokens in {job.config.train.steps:,} steps")


def _steps_to(train: TrainConfig, tokens: int) -> int:
    missing = tokens - consumed_tokens(train)
    return train.steps - (-missing // (train.global_batch_size * train.sequence_length))


def _rollout_counts(job: Job) -> Iterator[Finding]:
    rl, ranks = job.config.rl, job.data_parallel
    samples = rl.prompts_per_rollout * rl.group_size
    batch, rest = divmod(samples, rl.updates_per_rollout)
    text = f"{rl.prompts_per_rollout} prompts x {rl.group_size} = {samples} samples, {rl.updates_per_rollout} updates"
    if rest:
        return  # refused by the configuration's own rule
    if batch < ranks:
        yield refused(
            f"{text}: {batch} samples an update for {ranks} data-parallel ranks, some of which get none",
            "take fewer rl.updates_per_rollout, more rl.prompts_per_rollout or fewer ranks",
        )
    elif batch % rl.group_size:
        yield warning(
            f"{text}: an update of {batch} samples cuts groups of {rl.group_size}",
            "take rl.updates_per_rollout that divides rl.prompts_per_rollout",
        )
    else:
        yield passed(f"{text} of {batch}")


CHECKS = (
    Check(9, "batch ramp", _ramp, lambda job: reads(job.verb, "train.schedule.batch_ramp")),
    Check(10, "schedules in order and within the tokens", _phases, lambda job: job.verb == "pretrain"),
    Check(23, "prompts, groups and updates divide", _rollout_counts, lambda job: job.verb == "grpo"),
)
