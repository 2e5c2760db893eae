"""Composes every stage of a recipe in this process, as the stage itself would compose its command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.jobs import TrackConfig
from megatron_r1.config.keys import check_overrides, check_recipe, only_read, reads
from megatron_r1.config.load import flat, load_all, resolved
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.nodes import JobNodes, nodes_of
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline import OUTPUTS, TRAINING_VERBS, StageConfig, StageOutput
from megatron_r1.config.run import RunConfig
from megatron_r1.config.sglang import SlurmConfig
from megatron_r1.config.stage_checks import INPUT
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.graph import in_order, with_all_needed
from megatron_r1.runs.source import find_model


@dataclass(frozen=True)
class ComposedStage:
    """One stage, ready to run."""

    name: str
    verb: str
    folder: Path
    """Run folder of the stage."""
    arguments: tuple[str, ...]
    """Its command line, from the verb on."""
    ranks: int
    """Processes that run it."""
    inputs: Mapping[str, StageOutput]
    """Name -> what it takes."""
    paths: Mapping[str, str]
    """Name of an input -> its path."""
    settings: Mapping[str, Any]
    """Dotted key -> value, of every key that the verb reads."""
    config: RunConfig
    """Its resolved configuration."""
    model: ModelConfig
    """The model that its checkpoint or Hugging Face folder has."""
    needs: tuple[str, ...] = ()
    """Stages that must be done before, beside those of its inputs."""

    def nodes(self, ranks_per_node: int, gpus_per_node: int) -> JobNodes:
        """Nodes that it needs on a cluster; arguments and errors as of `nodes_of`."""
        rollout = self.config.rollout if self.verb == "grpo" else None
        return nodes_of(rollout, self.ranks, ranks_per_node, gpus_per_node)

    def makes(self) -> list[str]:
        """Types of the outputs that it makes with its settings."""
        if self.verb == "curate":
            return list(self.settings["curate.outputs"])
        if self.verb == "convert":
            return ["hf" if self.settings["convert.to"] == "hf" else "checkpoint"]
        return list(OUTPUTS[self.verb])

    def path_of(self, output: str) -> str:
        """Path of an output, in the form in which other stages' overrides take it."""
        place = OUTPUTS[self.verb][output]
        for key, value in self.settings.items():
            place = place.replace(f"{{{key}}}", str(value))
        path = str(self.folder / place)
        return f"hf:{path}" if output == "hf" else path


def compose_stages(config: RunConfig, folder: Path, names: Iterable[str] = ()) -> dict[str, ComposedStage]:
    """The stages of a recipe by name, in order; checked as the stage's own command line would be.

    Args:
        folder: of the recipe, with the stages' runs.
        names: compose these stages and those that they need alone, a seventh of a second each; () is all.

    Raises:
        ConfigError: the first stage that does not compose, with the key, its value and what is allowed.
    """
    composed: dict[str, ComposedStage] = {}
    common = _common_overrides(config)
    for name in with_all_needed(config.pipeline, names or in_order(config.pipeline)):
        stage = config.pipeline.stages[name]
        inputs = {key: config.pipeline.output_of(written) for key, written in stage.inputs.items()}
        try:
            composed[name] = _composed(name, stage, inputs, composed, folder, common, config.pipeline.ranks)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error.key}", error.value, error.allowed) from None
    return composed


def _common_overrides(config: RunConfig) -> list[str]:
    """Overrides that every stage gets after its own; each takes those that its verb reads."""
    changed = [
        *_changed("parallel", ParallelConfig(), lambda name: getattr(config.parallel, name)),
        *_changed("track", TrackConfig(), lambda name: getattr(config.track, name)),
        *_changed("rollout.sglang.slurm", SlurmConfig(), lambda name: getattr(config.rollout.sglang.slurm, name)),
    ]
    return [*config.pipeline.overrides, f"seed={config.seed}", f"platform={config.platform}", *changed]


def _changed(section: str, usual: Any, value: Callable[[str], Any]) -> list[str]:
    """Overrides for what differs from the usual in a section."""
    names = [field.name for field in fields(usual)]
    return [f"{section}.{name}={_written(value(name))}" for name in names if value(name) != getattr(usual, name)]


def _written(value: Any) -> str:
    """A number, a text or a list of them, as an override takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if not isinstance(value, str):
        return str(value)
    # Hydra reads a backslash as itself but before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value) + "'"


def _of_ranks(line: str) -> bool:
    """Whether an override says how a trainer's ranks share the work, or where their servers run."""
    return line.startswith(("parallel.", "rollout.sglang.slurm."))


def _composed(
    name: str,
    stage: StageConfig,
    inputs: Mapping[str, StageOutput],
    composed: Mapping[str, ComposedStage],
    folder: Path,
    common: list[str],
    ranks: int,
) -> ComposedStage:
    for key, output in inputs.items():
        if output.type not in (made := composed[output.stage].makes()):
            reason = f"{output.stage} makes {', '.join(made)} with its settings"
            raise ConfigError(f"inputs.{key}", f"{output.stage}.{output.type}", reason)
    paths = {key: composed[output.stage].path_of(output.type) for key, output in inputs.items()}
    overrides = [
        f"root='{folder}'",
        f"name={name}",
        *only_read(stage.verb, [f"track.group='{folder.resolve().name}'"]),
        *(INPUT.sub(lambda match: paths[match[1]], line) for line in stage.overrides),
        *only_read(stage.verb, [line for line in common if stage.verb in TRAINING_VERBS or not _of_ranks(line)]),
    ]
    models = {path: composed[inputs[key].stage].model for key, path in paths.items()}
    recipe = stage.config or VERBS[stage.verb].recipe
    check_overrides(stage.verb, overrides)
    run = load_all(stage.verb, overrides, recipe, lambda source: models.get(source) or model_if_there(source)).config
    check_recipe(stage.verb, recipe.removesuffix(".yaml"))
    size = stage.ranks or ranks or run.parallel.fewest_ranks() if stage.verb in TRAINING_VERBS else 1
    check_layout(run, stage.verb, size)
    VERBS[stage.verb].check(stage.verb, run.init.from_)
    settings = {key: value for key, value in flat(resolved(run)).items() if reads(stage.verb, key)}
    config_name = ["--config-name", stage.config] if stage.config else []
    return ComposedStage(
        name=name,
        verb=stage.verb,
        folder=folder / name,
        arguments=(stage.verb, *config_name, *overrides),
        ranks=size,
        inputs=inputs,
        paths=paths,
        settings=settings,
        config=run,
        model=run.model if reads(stage.verb, "model") else next(iter(models.values()), run.model),
        needs=tuple(stage.needs),
    )


def model_if_there(source: str) -> ModelConfig | None:
    """The model of weights that are given by a path; None where nothing is there yet, which a dry run allows."""
    return find_model(source) if Path(source.removeprefix("hf:")).exists() else None
