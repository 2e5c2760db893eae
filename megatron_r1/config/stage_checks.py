"""Checks of a recipe's stages against each other: overrides that a stage reads, inputs of the type that a key takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from megatron_r1.config.keys import check_overrides, overridden, reads
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import exists
from megatron_r1.errors import ConfigError

INPUT = re.compile(r"\{([A-Za-z_]\w*)\}")
"""An input's name in an override; what a regular expression writes as {2,4} is none."""
ACCEPTED = {
    "init.from": ("checkpoint", "hf"),
    "*.models.*": ("checkpoint", "hf"),
    "*.teacher.from": ("checkpoint", "hf"),
    "rl.critic.init_from": ("reward_model", "checkpoint", "hf"),
    "reward.*_model": ("reward_model",),
    "data.prompts.path": ("prompts", "samples"),
    "sft.datasets.*.path": ("conversations",),
    "curate.sources.*.path": ("samples", "conversations", "prompts"),
    "curate.review": ("review",),
    "*.train_file": ("pairs",),
    "*.eval_file": ("pairs",),
}
"""Key -> types of output that it takes. Other keys take any."""


def check_stages(pipeline: PipelineConfig) -> None:
    """Refuse overrides that a stage does not read, and inputs that it does not use or cannot take.

    Raises:
        ConfigError: names the override and the stage.
    """
    for name, stage in pipeline.stages.items():
        try:
            check_overrides(stage.verb, stage.overrides)
        except ConfigError as error:
            raise ConfigError(f"pipeline.stages.{name}.overrides", f"[{error.key}=...]", error.allowed) from None
        _check_inputs(pipeline, name)
    verbs = {stage.verb for stage in pipeline.stages.values()}
    for line in pipeline.overrides:
        key = line.partition("=")[0].lstrip("+~")
        if exists(key) and not any(reads(verb, key) for verb in verbs):
            raise ConfigError("pipeline.overrides", line, "no stage of this recipe reads it")


def _check_inputs(pipeline: PipelineConfig, name: str) -> None:
    stage, used = pipeline.stages[name], set[str]()
    for line in stage.overrides:
        used |= {match[1] for match in INPUT.finditer(line)}
        for key, input_name in keys_fed(line):
            written = stage.inputs.get(input_name)
            if written is None:
                inputs = f"one of {', '.join(stage.inputs)}" if stage.inputs else "an input, and the stage has none"
                raise ConfigError(f"pipeline.stages.{name}.overrides", line, f"{{{input_name}}} must be {inputs}")
            output = pipeline.output_of(written)
            accepted = accepted_types(key)
            if accepted and output.type not in accepted:
                reason = f"{key} takes a {' or '.join(accepted)}, and {written} is a {output.type}"
                raise ConfigError(f"pipeline.stages.{name}.overrides", line, reason)
    for input_name in stage.inputs.keys() - used:
        key = f"pipeline.stages.{name}.inputs.{input_name}"
        raise ConfigError(key, stage.inputs[input_name], f"no override of the stage uses {{{input_name}}}")


def keys_fed(line: str) -> Iterator[tuple[str, str]]:
    """Key and input's name, for every input that an override uses."""
    whole, *within = overridden(line)
    for key, value in [(key, value) for key, value in within if value is not None] or [whole]:
        yield from ((key, match[1]) for match in INPUT.finditer(str(value)))


def accepted_types(key: str) -> tuple[str, ...]:
    """Types of output that a key accepts; empty where it accepts any."""
    return next((types for pattern, types in ACCEPTED.items() if fnmatchcase(key, pattern)), ())
