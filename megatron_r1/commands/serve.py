"""serve: the servers of a training command on this node of its SLURM job, until a signal ends them."""

from __future__ import annotations

import os
import signal
import threading

from megatron_r1.config.keys import check_overrides, check_recipe
from megatron_r1.config.load import load_all
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import JobCommand
from megatron_r1.errors import ConfigError, ExitCode
from megatron_r1.pipeline.compose import compose_stages
from megatron_r1.platform import select
from megatron_r1.rollout.factory import servers_of_node
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.initial_weights import initial_model
from megatron_r1.runs.source import find_model

NODE = "SLURMD_NODENAME"
CHECK_S = 1.0


def run_command(command: JobCommand) -> int:
    """Start the servers that the command's trainer expects on this node; they get their weights from it.

    Raises:
        ConfigError: the command expects no servers on nodes of a SLURM job, or this is none.
        NoRolloutCapacity: a server ended.
    """
    check_overrides(command.verb, command.overrides)
    check_recipe(command.verb, command.recipe)
    config = load_all(command.verb, command.overrides, command.recipe, find_model).config
    if command.verb == "pipeline":
        config = stage_of(config)
    serve(config, own_node(config))
    return int(ExitCode.DONE)


def stage_of(recipe: RunConfig) -> RunConfig:
    """The configuration of the stage that the recipe's command runs.

    Raises:
        ConfigError: it runs several.
    """
    name = recipe.pipeline.only
    if not name:
        raise ConfigError("pipeline.only", "", "must name the stage whose servers are to start")
    return compose_stages(recipe, run_folder(recipe), [name])[name].config


def own_node(config: RunConfig) -> str:
    """The name of this node, by which the trainer finds its servers."""
    where = config.rollout.sglang.slurm.nodes
    if where == "none" or NODE not in os.environ:
        allowed = "serve needs job or component, and to be started by srun"
        raise ConfigError("rollout.sglang.slurm.nodes", where, allowed)
    return os.environ[NODE]


def serve(config: RunConfig, node: str) -> None:
    """Run the servers until SIGTERM or SIGUSR1."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: ended.set())
    model, _ = initial_model(config)
    logs = run_folder(config) / "logs"
    if (logs / "latest").is_dir():  # of this attempt of the job
        logs = (logs / "latest").resolve()
    device = select(config.platform).name
    with servers_of_node(config.rollout, model.model, model.tokenizer_folder, logs, device, node) as servers:
        while not ended.wait(CHECK_S):
            for server in servers:
                server.check()
