"""plan: which layout a job should have on a cluster, how much memory and time it takes, and what it costs."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.keys import check_overrides, check_recipe
from megatron_r1.config.load import load_sections
from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.errors import ConfigError, ExitCode
from megatron_r1.plan.constants import UNCERTAINTY, Constants
from megatron_r1.plan.cost import cost
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.report import Plan, show, show_layouts, write
from megatron_r1.plan.search import search, smallest_cluster
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.source import find_model

SUBMITTED = ("plan", "cluster", "submit", "check")
"""Sections that a command to plan may set beside its verb's: the last three go to `submit` as they are."""


def run_command(command: JobCommand) -> int:
    """Plan a command, print the plan and write it into the run's folder; nothing is started.

    Returns:
        The exit status, that of a refused configuration where no layout fits.

    Raises:
        ConfigError: a key is not allowed, or the verb does not train.
    """
    start = time.perf_counter()
    config, overrides = planned(command)
    verb, constants = command.verb, Constants()
    fixed = Fixed(frozenset(line.lstrip("+~").partition("=")[0] for line in overrides))
    gpus = config.plan.gpus
    found = search(config, verb, gpus, constants, fixed) if gpus else smallest_cluster(config, verb, constants, fixed)
    if not found.best_first:
        show_layouts(found, config, Console(highlight=False))
        return int(ExitCode.BAD_CONFIG)
    best = found.best_first[0]
    price = cost(best.job.config, verb, found.gpus, GPUS[config.plan.gpu].per_node, best.seconds)
    plan = Plan(command, config, found, price, constants, UNCERTAINTY)
    write(plan, Path(run_folder(config)) / "plan")
    show(plan, time.perf_counter() - start)
    return int(ExitCode.DONE)


def planned(command: JobCommand) -> tuple[RunConfig, list[str]]:
    """The configuration of a command that is planned, and its overrides without short forms.

    Raises:
        ConfigError: a key is not allowed, or the verb does not train.
    """
    if command.verb not in TRAINING_VERBS:
        raise ConfigError("VERB", command.verb, f"plan takes the command of one of {', '.join(TRAINING_VERBS)}")
    short = dict(VERBS["plan"].short_forms)
    overrides = []
    for line in command.overrides:
        key, equals, value = line.partition("=")
        overrides.append(f"{short.get(key, key)}{equals}{value}")
    own = [line for line in overrides if line.lstrip("+~").partition("=")[0].partition(".")[0] in SUBMITTED]
    check_overrides(command.verb, [line for line in overrides if line not in own])
    check_recipe(command.verb, command.recipe)
    return load_sections(command.verb, overrides, command.recipe, find_model).config, overrides
