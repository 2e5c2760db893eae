"""Several sources of prompts in one rollout, each with its share and the step from which it takes part."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_r1.config.data import DataConfig, PromptsConfig
from megatron_r1.data.prompts.files import PromptFile
from megatron_r1.data.prompts.prompts import FilePrompts, Prompt, Prompts, TrainingPrompts
from megatron_r1.errors import ConfigError

ONLY = ""
"""Name of the source of a run that has no mixture."""


def prompt_files(config: DataConfig) -> dict[str, PromptsConfig]:
    """Source -> the file or dataset of its prompts; sources of a generated world have none."""
    sources = {name: source.prompts for name, source in config.mixture.items()} or {ONLY: config.prompts}
    return {name: source for name, source in sources.items() if source.path}


@dataclass(frozen=True)
class PromptSource:
    """One source of a mixture."""

    prompts: Prompts
    share: float
    first_step: int


@dataclass(frozen=True)
class StepPositions:
    """Which step a prompt's index belongs to: the steps' own prompts, and those that replace dropped ones."""

    prompts_per_step: int
    refills: int
    """Index of the first prompt that replaces another."""
    refill_rounds: int

    def step(self, index: int) -> int:
        if index >= self.refills:
            index = (index - self.refills) // max(1, self.refill_rounds)
        return index // self.prompts_per_step


class MixedPrompts:
    """The sources as one endless list.

    Each index draws its source, by the shares of those that take part in its step, and is that source's prompt of the
    same index. So every index has the same prompt at every call, and no prompt of a file comes twice in one pass over
    it, though a pass leaves out those whose indices other sources drew.
    """

    def __init__(self, sources: Sequence[PromptSource], positions: StepPositions, seed: int):
        self._sources, self._positions, self._seed = tuple(sources), positions, seed

    def at(self, index: int) -> Prompt:
        """Prompt `index`; the same prompt at every call."""
        step = self._positions.step(index)
        present = [source for source in self._sources if source.first_step <= step]
        rng = random.Random(f"mixture {self._seed} {index}")
        [source] = rng.choices(present, [source.share for source in present])
        return source.prompts.at(index)


def training_prompts(
    config: DataConfig, files: Mapping[str, PromptFile], positions: StepPositions, steps: int
) -> Prompts:
    """The prompts of a run.

    Args:
        files: what `prompt_files` names, read.
        steps: of the whole run.

    Raises:
        ConfigError: no source takes part from the first step on.
    """
    if not config.mixture:
        return FilePrompts(files[ONLY].prompts, config.seed) if files else TrainingPrompts(config)
    sources = []
    for name, source in config.mixture.items():
        # In the assistant world alone, general tasks and nothing beside them.
        world = replace(config, source=source.world, arithmetic_share=0.0)
        prompts = FilePrompts(files[name].prompts, config.seed) if name in files else TrainingPrompts(world)
        sources.append(PromptSource(prompts, source.share, source.first_step(steps)))
    if (earliest := min(sources, key=lambda source: source.first_step)).first_step > 0:
        name = [*config.mixture][sources.index(earliest)]
        allowed = f"must be 0 for one source at the least: the steps before {earliest.first_step} have no prompts"
        raise ConfigError(f"data.mixture.{name}.from_step", config.mixture[name].from_step, allowed)
    return MixedPrompts(sources, positions, config.seed)
