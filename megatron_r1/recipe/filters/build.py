"""Builds the filters that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.filters.agreement import disagreement
from megatron_r1.recipe.filters.contamination import Contamination, held_out_by_world, read_evaluations
from megatron_r1.recipe.filters.filter import Filter, of_each
from megatron_r1.recipe.filters.finished import unfinished
from megatron_r1.recipe.filters.form import badly_formatted, leftover_tags, unreadable
from megatron_r1.recipe.filters.judge import JudgeFilter
from megatron_r1.recipe.filters.language import mixed_language
from megatron_r1.recipe.filters.length import bad_length
from megatron_r1.recipe.filters.reasoning import code_in_reasoning, long_paragraph, trivial_reasoning
from megatron_r1.recipe.filters.repetition import repeats_itself
from megatron_r1.recipe.filters.right import wrong
from megatron_r1.recipe.review import rejected
from megatron_r1.rewards.judge.reward import JudgeReward


def build_filters(config: RunConfig) -> dict[str, Filter]:
    """The filters in the order of the configuration, by name; before them a person's decisions, where there are some.

    Raises:
        ConfigError: a filter lacks what it needs.
        DataError: an evaluation file cannot be read.
    """
    names = [*(["review"] if config.curate.review else []), *config.curate.filters]
    return {name: _build(name, config) for name in names}


def _build(name: str, config: RunConfig) -> Filter:
    if name == "contamination":
        return contamination(config)
    if name == "judge":
        return _judge(config)
    return of_each(_single_rows(config)[name])


def _single_rows(config: RunConfig) -> dict[str, Callable[[Candidate], str]]:
    """The filters that look at one row at a time."""
    limits = config.curate.limits
    return {
        "review": partial(rejected, undecided=config.curate.undecided),
        "finished": unfinished,
        "length": partial(bad_length, shortest=limits.shortest_response, longest=limits.longest_response),
        "format": partial(badly_formatted, style=limits.format),
        "tags": leftover_tags,
        "readable": partial(unreadable, text_share=limits.text_share, longest_word=limits.longest_word),
        "reasoning": partial(trivial_reasoning, fewest_words=limits.fewest_reasoning_words),
        "paragraphs": partial(long_paragraph, most_words=limits.longest_paragraph),
        "code": code_in_reasoning,
        "language": partial(mixed_language, share=limits.language_share),
        "repetition": partial(
            repeats_itself,
            ngram_size=limits.repetition_ngram_size,
            share=limits.repetition_share,
            times=limits.loop_times,
            words=limits.loop_words,
        ),
        "right": wrong,
        "agreement": disagreement,
    }


def contamination(config: RunConfig) -> Contamination:
    """The filter by what is held out."""
    held_out = config.curate.held_out
    by_world = partial(held_out_by_world, eval_fraction=config.data.eval_fraction if held_out.world else 0.0)
    return Contamination(list(read_evaluations(held_out)), held_out.ngram, by_world)


def _judge(config: RunConfig) -> JudgeFilter:
    if not config.reward.judge:
        raise ConfigError("reward.judge", config.reward.judge, "must be above 0 with the filter judge")
    return JudgeFilter(JudgeReward(config.reward.judge_config), config.curate.limits.judge_score)
