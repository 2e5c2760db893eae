"""sample: reads a file of prompts and writes scored responses, for rejection sampling and evaluation."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_r1.config.run import RunConfig
from megatron_r1.data.prompts.files import read_prompts
from megatron_r1.data.prompts.prompts import TrainingPrompts
from megatron_r1.data.prompts.style import KEY, PromptStyle
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.accuracy import Accuracy, truth_problems
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rollout.sampling_job import SamplingJob, plan_of, publish
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.inference_engine import inference_engine
from megatron_r1.runs.initial_weights import find_weights
from megatron_r1.runs.prompts import BAD_ROWS, list_bad_records, prompt_formatter

PARTS = "parts"


def run(config: RunConfig) -> None:
    """Sample responses to every prompt, or resume the job."""
    style = check(config)
    found = find_weights(config.init.from_, which=config.init.weights)
    formatter = prompt_formatter(config, found.tokenizer(), found.model.max_sequence_length)
    tokenizer, limit = formatter.tokenizer, config.sample.max_prompts
    truths = partial(truth_problems, config.reward) if config.reward.reads_answers else None
    prompts_config = config.data.prompts
    field = config.sample.response_field if style.needs_response else ""
    file = None
    if prompts_config.path:
        file = read_prompts(prompts_config, formatter.check, limit, truths, request=style.request, response_field=field)
    world = TrainingPrompts(config.data)
    prompts = file.prompts if file else [world.at(index) for index in range(limit)]
    folder = open_run_folder(config)
    if file:
        list_bad_records([file], folder)
    plan = plan_of(config, prompts, formatter, style, found.folder)
    job = SamplingJob(folder / PARTS, prompts, formatter, style, config, plan)
    todo = list(job.missing())
    if todo:
        if models := config.reward.models:
            allowed = "must be 0 here: reward models work beside a trainer, in grpo"
            raise ConfigError(f"reward.{min(models)}", getattr(config.reward, min(models)), allowed)
        count_tokens = lambda text: len(tokenizer.encode(text))  # noqa: E731
        scorer = build_rubric(config.reward, count_tokens, instructions=formatter.instructions)
        with (
            inference_engine(config, found, dict(found.tensors), folder) as (engine, sync),
            closing(Accuracy(replace(config.reward, answer_format="any"))) as any_format,
        ):
            sync.push(found.folder.name)
            job.sample(todo, engine, tokenizer, scorer, any_format)
    target, totals = publish(job, folder, config.sample.format)
    report(target, totals, len(file.bad_rows) if file else 0)
    mark_done(folder, totals)


def check(config: RunConfig) -> PromptStyle:
    """Check the config for this verb; returns the style of its prompts.

    Raises:
        ConfigError: generated prompts are requested without a limit, or in a style that shows responses, which they
            do not have; or there is no such style.
    """
    if not (config.data.prompts.path or config.sample.max_prompts):
        raise ConfigError("sample.max_prompts", 0, "must be above 0 with generated prompts, which are endless")
    style = PromptStyle(config.sample.prompt_style)
    if style.needs_response and not config.data.prompts.path:
        raise ConfigError(KEY, config.sample.prompt_style, "shows responses: name their rows in data.prompts.path")
    return style


def report(target: Path, totals: dict[str, Any], bad_rows: int) -> None:
    """Show what was sampled on the terminal."""
    line = f"{totals['samples']} samples of {totals['prompts']} prompts, mean reward {totals['mean_reward']:.3f}, "
    line += f"correct {totals['correct']:.3f}, correct in any sample {totals['correct_in_any_sample']:.3f}"
    if bad_rows:
        line += f"; {bad_rows} bad rows dropped, see {BAD_ROWS}"
    Console(stderr=True).print(f"{target}: {line}", soft_wrap=True, highlight=False)
