"""A recipe as jobs: one for each stage, each waits until the one before is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_r1.config.run import RunConfig
from megatron_r1.pipeline.graph import selected
from megatron_r1.runs.folder import run_folder

SELECTIONS = ("from", "until", "only", "pipeline.from", "pipeline.until", "pipeline.only")


def stage_jobs(config: RunConfig) -> Mapping[str, RunConfig]:
    """Stage -> its job, in order; their scripts and logs are in `jobs/` of the recipe's folder."""
    return {stage: _stage_job(config, stage) for stage in selected(config.pipeline)}


def _stage_job(config: RunConfig, stage: str) -> RunConfig:
    kept = [line for line in config.submit.arguments if line.lstrip("+").partition("=")[0] not in SELECTIONS]
    submit = replace(config.submit, arguments=[*kept, f"pipeline.only={stage}"])
    return replace(config, root=str(run_folder(config) / "jobs"), name=f"{config.name}.{stage}", submit=submit)
