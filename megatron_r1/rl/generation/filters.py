"""Filters of rollouts: small pure strategies over the responses to one prompt, composed by configuration.

A filter takes a group and returns what remains of it. A group with fewer than two remaining responses, or none to train
on, has no baseline or no use and is dropped. What filters remove is counted by name, so that it shows in the metrics.

Sources: DAPO (Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale"), section 3.2, dynamic
sampling: groups that are all right or all wrong have advantages of zero and are replaced; section 3.4, overlong
filtering: the loss of truncated responses is masked, since a truncated response may have been a good one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_r1.config.rl import FilterConfig
from megatron_r1.rollout.sample import Sample, response_of

Group = Sequence[Sample]
"""The scored responses to one prompt."""
Filter = Callable[[Group], list[Sample]]

MIN_GROUP_SIZE = 2
ZERO_STD = "zero_std_groups"
"""The filter that drops whole groups."""


def drop_duplicates(group: Group) -> list[Sample]:
    """Keeps the first of responses with the same tokens: a copy would count its advantage twice."""
    first: dict[bytes, Sample] = {}
    for sample in group:
        first.setdefault(response_of(sample).tokens.tobytes(), sample)
    return list(first.values())


def drop_truncated(group: Group) -> list[Sample]:
    """Removes the responses that reached the length limit."""
    return [sample for sample in group if sample.finish_reason != "length"]


def mask_truncated(group: Group) -> list[Sample]:
    """Masks the loss of responses that reached the length limit; they stay in the group's baseline (DAPO, 3.4)."""
    return [replace(sample, in_loss=False) if sample.finish_reason == "length" else sample for sample in group]


def drop_zero_std(group: Group) -> list[Sample]:
    """Removes the group when all its rewards are equal, those of steps too (DAPO, 3.2: 0 < correct responses < G)."""
    rewards = {reward for sample in group for reward in (sample.reward, *(value for _, value in sample.steps))}
    return [] if len(rewards) == 1 else list(group)


def build_filters(config: FilterConfig) -> dict[str, Filter]:
    """The configured filters by the name under which they count, in the order in which they apply."""
    filters: dict[str, Filter] = {}
    if config.duplicates == "drop":
        filters["duplicates"] = drop_duplicates
    if config.truncated != "keep":
        filters["truncated"] = mask_truncated if config.truncated == "mask" else drop_truncated
    if config.zero_std_groups == "drop":
        filters[ZERO_STD] = drop_zero_std
    return filters


def apply_filters(group: Group, filters: dict[str, Filter]) -> tuple[list[Sample], Counter[str]]:
    """The remaining responses of a group, none where it is dropped; and counts of what was removed.

    Counts, by metric: for each filter the responses that it removed or masked, for `ZERO_STD` the groups;
    `rollout/filtered_small_groups` are groups that were dropped because too few responses remained or none to train on.
    """
    counts: Counter[str] = Counter()
    remaining = list(group)
    for name, apply in filters.items():
        before, remaining = remaining, apply(remaining)
        if name == ZERO_STD:
            counts[counted_as(name)] += not remaining
            continue
        counts[counted_as(name)] += len(before) - len(remaining) + _masked(remaining) - _masked(before)
        if len(remaining) < MIN_GROUP_SIZE or _masked(remaining) == len(remaining):
            return [], counts + Counter({"rollout/filtered_small_groups": 1})
    return remaining, +counts


def counted_as(name: str) -> str:
    """The metric that counts what a filter removes."""
    return f"rollout/filtered_{name}"


def _masked(group: Group) -> int:
    return sum(not sample.in_loss for sample in group)
