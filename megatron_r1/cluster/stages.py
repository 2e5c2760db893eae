"""A recipe as jobs: one for each stage, on the nodes that the stage needs; each waits until the one before is done."""

from __future__ import annotations

from dataclasses import replace

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.compose import ComposedStage, compose_stages
from megatron_r1.pipeline.graph import selected
from megatron_r1.runs.folder import run_folder

SELECTIONS = ("from", "until", "only", "pipeline.from", "pipeline.until", "pipeline.only")


def stage_jobs(config: RunConfig) -> dict[str, RunConfig]:
    """Stage -> its job, in order; their scripts and logs are in `jobs/` of the recipe's folder.

    Raises:
        ConfigError: a stage does not compose, or its ranks or servers do not fit on the cluster's nodes.
    """
    names = selected(config.pipeline)
    stages = compose_stages(config, run_folder(config), names)
    return {name: _stage_job(config, stages[name]) for name in names}


def _stage_job(config: RunConfig, stage: ComposedStage) -> RunConfig:
    """The stage's own configuration, with the recipe's command for it alone.

    On one node the recipe's process starts the stage's ranks itself. Where there are several, SLURM starts them, as of
    any job of the stage's verb.
    """
    kept = [line for line in config.submit.arguments if line.lstrip("+").partition("=")[0] not in SELECTIONS]
    cluster, per_node = config.cluster, config.cluster.ranks
    try:
        nodes = stage.nodes(per_node, cluster.gpus_per_node)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name}: {error.key}", error.value, error.allowed) from None
    if nodes.trainer > 1 and stage.ranks % per_node:
        allowed = f"must be a multiple of {per_node}, the ranks of a node, on {nodes.trainer} nodes"
        raise ConfigError(f"pipeline.stages.{stage.name}.ranks", stage.ranks, allowed)
    submit = replace(
        config.submit,
        command=stage.verb if nodes.total > 1 else config.submit.command,
        arguments=[*kept, f"pipeline.only={stage.name}"],
        nodes=nodes.total,
        engine_nodes=nodes.engine,
    )
    if nodes.total > 1:
        cluster = replace(cluster, ranks_per_node=min(per_node, stage.ranks))
    folder, name = str(run_folder(config) / "jobs"), f"{config.name}.{stage.name}"
    return replace(stage.config, root=folder, name=name, cluster=cluster, check=config.check, submit=submit)
