"""Which check an error of the configuration belongs to: the rules themselves are the configuration's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from megatron_r1.check.finding import Check, Finding, Job, finding_of
from megatron_r1.config.cross_checks import check_layout, check_sections
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError, UserError

KEYS = 1
"""Number of the check for errors that no other claims."""
CHECK_OF = {
    "parallel.pipeline*": 3,
    "parallel.virtual_pipeline": 3,
    "parallel.microbatch_group_size_per_vp_stage": 3,
    "parallel.tensor": 4,
    "model.attention.num_key_value_heads": 4,
    "parallel.expert": 5,
    "model.moe.*": 5,
    "parallel.expert_tensor": 6,
    "parallel.context": 7,
    "train.sequence_length": 7,
    "model.max_sequence_length": 7,
    "train.micro_batch_size": 8,
    "train.global_batch_size": 8,
    "train.schedule.*": 10,
    "train.schedule.batch_ramp*": 9,
    "model.rope.*": 11,
    "fp8.*": 12,
    "rollout.placement": 15,
    "init.*": 18,
    "data.vocab_size": 19,
    "data.prompts.*": 21,
    "rollout.max_response_tokens": 22,
    "rl.tokens_per_micro_batch": 22,
    "rl.group_size": 23,
    "rl.updates_per_rollout": 23,
    "reward.*": 24,
    "rollout.weight_sync.include_mtp": 26,
    "rollout.sglang.server.speculative.*": 26,
    "rl.routing_replay": 27,
    "rollout.sglang.server.return_routed_experts": 27,
    "performance.moe_token_dispatcher_type": 28,
}
"""Key, or pattern of keys -> number of the check that has its errors; the longest pattern that fits decides."""


def check_of(error: UserError) -> int:
    """Number of the check that an error of the configuration belongs to."""
    key = error.key if isinstance(error, ConfigError) else "init.from"
    fitting = [pattern for pattern in CHECK_OF if fnmatchcase(key, pattern)]
    return CHECK_OF[max(fitting, key=len)] if fitting else KEYS


def broken_rules(job: Job) -> Iterator[UserError]:
    """What the configuration's own checks of several sections refuse."""
    config = job.config
    rules: tuple[Callable[[], None], ...] = (
        lambda: check_sections(config, job.verb),
        lambda: check_layout(config, job.verb, job.ranks),
        lambda: VERBS[job.verb].check(job.verb, config.init.from_),
    )
    for rule in rules:
        try:
            rule()
        except UserError as error:
            yield error


def _contradictions(job: Job) -> Iterator[Finding]:
    yield from (finding_of(error) for error in broken_rules(job) if check_of(error) == KEYS)


CHECKS = (Check(KEYS, "keys known, and none contradicts another", _contradictions),)
