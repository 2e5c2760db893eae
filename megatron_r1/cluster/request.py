"""What `submit VERB key=value ...` requests: the verb's own checked configuration, and the job's command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.keys import check_overrides, check_recipe, reads
from megatron_r1.config.load import FindModel, load_all
from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.errors import ConfigError

OWN = ("cluster", "submit", "check")
"""Sections that the job's own command line does not get."""


def requested_job(command: JobCommand, find_model: FindModel) -> RunConfig:
    """The configuration of the verb that the job runs, checked as if it ran here with the job's ranks.

    Args:
        command: its overrides hold keys of `cluster`, `submit` and `check` too.
        find_model: as of `load_all`.

    Raises:
        ConfigError: names the key that is not allowed.
    """
    overrides = [_spelt_out(line) for line in command.overrides]
    passed = [line for line in overrides if _section(line) not in OWN]
    own = [line for line in overrides if line not in passed]
    check_overrides(command.verb, passed)
    config = load_all(command.verb, [*passed, *own], command.recipe, find_model).config
    check_recipe(command.verb, command.recipe)
    config = with_arguments(config, command, passed)
    check_layout(config, command.verb, trainer_ranks(config))
    VERBS[command.verb].check(command.verb, config.init.from_)
    check_roles(config)
    return config


def check_roles(config: RunConfig) -> None:
    """Refuse nodes that the job's verb has no use for.

    Raises:
        ConfigError: names the key that does not fit.
    """
    verb, submit, rollout = config.submit.command, config.submit, config.rollout
    if verb == "pipeline" and submit.stage_jobs and submit.nodes > 1:
        allowed = "must be left out: each stage takes the nodes that it needs, which dry_run=true shows"
        raise ConfigError("submit.nodes", submit.nodes, allowed)
    if submit.nodes > 1 and not is_training(config):
        raise ConfigError("submit.nodes", submit.nodes, f"must be 1: {verb} runs on one node")
    if submit.engine_nodes and not (verb == "grpo" and rollout.engine == "sglang" and rollout.placement == "separate"):
        needs = "must be 0 but for grpo with rollout.engine=sglang and rollout.placement=separate"
        raise ConfigError("submit.engine_nodes", submit.engine_nodes, needs)
    if submit.heterogeneous and not submit.engine_nodes:
        raise ConfigError("submit.heterogeneous", True, "must be false where submit.engine_nodes is 0")
    if submit.heterogeneous and submit.restart == "requeue":
        allowed = "must be chain, singleton or none where submit.heterogeneous is true: SLURM leaves such a job pending"
        raise ConfigError("submit.restart", submit.restart, f"{allowed} after a requeue")
    if verb == "pipeline" and submit.stage_jobs and submit.restart == "singleton":
        allowed = "must be requeue, chain or none where each stage is a job that waits for the one before; with"
        raise ConfigError("submit.restart", submit.restart, f"{allowed} submit.stage_jobs=false, each job runs all")
    if submit.engine_nodes and rollout.sglang.started_elsewhere:
        allowed = "must be 0 where rollout.sglang names servers that are started elsewhere"
        raise ConfigError("submit.engine_nodes", submit.engine_nodes, allowed)


def command_to_check(command: JobCommand, config: RunConfig) -> JobCommand:
    """The command that `check` takes, with the job's machine."""
    cluster = config.cluster
    machine = [f"check.gpus_per_node={max(1, cluster.ranks)}"]
    # The stages of a recipe have ranks of their own, and nodes where each is a job.
    machine += [f"check.ranks={trainer_ranks(config)}"] if is_training(config) else []
    by_stage = config.submit.command == "pipeline" and config.submit.stage_jobs
    machine += [] if by_stage else [f"check.nodes={config.submit.nodes}"]
    machine += [f"check.gpu={cluster.gpu}"] if cluster.gpu else []
    machine += [f"check.partition={cluster.partition}"] if cluster.partition else []
    machine += [f"check.time_limit_minutes={config.submit.seconds // 60}"]
    lines = [line for line in command.overrides if _section(_spelt_out(line)) not in ("cluster", "submit")]
    platform = [f"platform={config.platform}"] if reads(command.verb, "platform") else []  # of the job, not of `auto`
    return replace(command, overrides=(*machine, *lines, *platform))


def with_arguments(config: RunConfig, command: JobCommand, passed: Sequence[str]) -> RunConfig:
    """The configuration with the command line of its job."""
    arguments = [command.verb, "--config-name", command.recipe, *passed]
    if reads(command.verb, "platform") and config.platform == "auto":  # a job that chose might train without its GPUs
        config = replace(config, platform="cuda" if config.cluster.gpus_per_node else "cpu")
        arguments += [f"platform={config.platform}"]
    return replace(config, submit=replace(config.submit, command=command.verb, arguments=arguments))


def is_training(config: RunConfig) -> bool:
    """Whether the job's verb runs on many ranks."""
    return config.submit.command in TRAINING_VERBS


def trainer_ranks(config: RunConfig) -> int:
    """Ranks of the job's trainer."""
    trainer_nodes = config.submit.nodes - config.submit.engine_nodes
    return trainer_nodes * config.cluster.ranks if is_training(config) else 1


def _spelt_out(line: str) -> str:
    """An override of `submit` without its short form."""
    key, equals, value = line.partition("=")
    return f"{dict(VERBS['submit'].short_forms).get(key, key)}{equals}{value}"


def _section(line: str) -> str:
    return line.lstrip("+~").partition("=")[0].partition(".")[0]
