"""plan: which layout a job should have on a cluster, how much memory and time it takes, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.keys import check_overrides, check_recipe
from megatron_r1.config.load import load_sections
from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.errors import ConfigError, ExitCode, UserError
from megatron_r1.plan.calibrate import Calibration, calibrate
from megatron_r1.plan.constants import UNCERTAINTY, Constants
from megatron_r1.plan.cost import cost
from megatron_r1.plan.layouts import Fixed
from megatron_r1.plan.report import JobPlan, show, show_layouts, wide_console, write
from megatron_r1.plan.search import Found, imbalance, search, smallest_cluster
from megatron_r1.plan.split import Split, splits
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.source import find_model

SUBMITTED = ("plan", "cluster", "submit", "check")
"""Sections that a command to plan may set beside its verb's: the last three go to `submit` as they are."""


def run_command(command: JobCommand) -> int:
    """Plan a command, print the plan and write it into the run's folder; nothing is started.

    Raises:
        ConfigError: a key is not allowed, the verb does not train, or no layout fits.
    """
    start = time.perf_counter()
    config = planned(command)
    verb, calibration = command.verb, _calibration(config)
    constants = calibration.constants if calibration else Constants()
    fixed = Fixed(frozenset(map(_key, spelt_out(command.overrides))))
    found, split = _searched(config, verb, constants, fixed)
    if not found.best_first:
        show_layouts(found, config, verb, wide_console())
        allowed = "no layout fits: take another number, or leave out keys that fix one"
        raise ConfigError("plan.gpus", config.plan.gpus or found.gpus, allowed)
    best, gpus = found.best_first[0], found.gpus
    seconds = best.seconds
    if split:
        gpus, seconds = gpus + split.engine_gpus, split.step.total
    price = cost(best.job.config, verb, gpus, GPUS[config.plan.gpu].per_node, seconds)
    uncertainty = calibration.uncertainty if calibration else UNCERTAINTY
    plan = JobPlan(command, config, found, price, constants, uncertainty, split)
    if calibration:
        print(calibration.text())
    write(plan, Path(run_folder(config)) / "plan")
    show(plan, time.perf_counter() - start)
    return int(ExitCode.DONE)


def _calibration(config: RunConfig) -> Calibration | None:
    """Of the run that `plan.calibrate` names."""
    plan = config.plan
    if not plan.calibrate:
        return None
    gpus = plan.calibrate_gpus or plan.gpus
    if not gpus:
        raise ConfigError("plan.calibrate_gpus", 0, "must be the number of GPUs of the run that plan.calibrate names")
    return calibrate(Path(plan.calibrate), GPUS[plan.gpu], gpus, imbalance(config), Constants())


def _searched(config: RunConfig, verb: str, constants: Constants, fixed: Fixed) -> tuple[Found, Split | None]:
    """The trainer's layouts, and for reinforcement learning the best division of the nodes."""
    gpus = config.plan.gpus
    if verb == "grpo":
        found, nothing = splits(config, gpus or _smallest(config, constants, fixed), constants, fixed)
        return (found[0].trainer, found[0]) if found else (max(nothing, key=lambda one: one.gpus), None)
    if gpus:
        return search(config, verb, gpus, constants, fixed), None
    return smallest_cluster(config, verb, constants, fixed), None


def _smallest(config: RunConfig, constants: Constants, fixed: Fixed) -> int:
    """GPUs of the smallest trainer, and as many for the servers where they have their own."""
    trainer = smallest_cluster(config, "grpo", constants, fixed).gpus
    return trainer if config.rollout.placement == "colocated" else 2 * trainer


def planned(command: JobCommand) -> RunConfig:
    """The configuration of a command that is planned.

    Raises:
        ConfigError: a key is not allowed, or the verb does not train.
    """
    if command.verb not in TRAINING_VERBS:
        raise ConfigError("VERB", command.verb, f"plan takes the command of one of {', '.join(TRAINING_VERBS)}")
    overrides = spelt_out(command.overrides)
    check_overrides(command.verb, [line for line in overrides if _key(line).partition(".")[0] not in SUBMITTED])
    check_recipe(command.verb, command.recipe)
    try:
        return load_sections(command.verb, overrides, command.recipe, find_model).config
    except UserError:  # weights that an earlier job will have made; the recipe says what they are
        return load_sections(command.verb, overrides, command.recipe, None).config


def spelt_out(overrides: Sequence[str]) -> list[str]:
    """Overrides without short forms."""
    short = dict(VERBS["plan"].short_forms)
    lines = [line.partition("=") for line in overrides]
    return [f"{short.get(key, key)}{equals}{value}" for key, equals, value in lines]


def _key(line: str) -> str:
    return line.lstrip("+~").partition("=")[0]
