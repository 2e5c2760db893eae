"""A recipe: stages with typed inputs and outputs, each a run of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError

TRAINING_VERBS = ("pretrain", "sft", "reward_model", "dpo", "grpo")
OUTPUTS = {
    **{verb: {"checkpoint": ""} for verb in ("pretrain", "sft", "dpo", "grpo", "average")},
    "reward_model": {"reward_model": ""},
    "sample": {"samples": "samples.{sample.format}"},
    "curate": {
        "conversations": "conversations.jsonl",
        "prompts": "prompts.jsonl",
        "pairs": "pairs.jsonl",
        "samples": "samples.jsonl",
        "review": "review.jsonl",
    },
    "evaluate": {"results": "results.json"},
    "convert": {"hf": "hf", "checkpoint": ""},
}
"""Verb -> type of each output -> its path in the stage's folder, where {KEY} is a value of the stage's configuration.

A checkpoint and a reward model are the run folder itself, as `init.from` and `reward.helpfulness_model` take it; an
`hf` output is given as `hf:FOLDER`.
"""
REPLACED = "replaced"
"""Folder beside the stages' folders: runs that were made otherwise than the recipe now says."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """One output of one stage."""

    stage: str
    """Name of the stage that makes it."""
    type: str
    """Its type, a key of OUTPUTS."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage: a verb, a recipe file, inputs and overrides."""

    verb: str = ""
    """Verb that runs."""
    config: str = ""
    """Recipe file in configs/; empty takes the verb's own."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Name -> output of another stage: STAGE, or STAGE.OUTPUT where its verb has several outputs."""
    needs: list[str] = field(default_factory=list)
    """Stages that must run before this one although it takes no output of theirs."""
    overrides: list[str] = field(default_factory=list)
    """key=value, as on the command line; {NAME} stands for the path of the input NAME."""
    ranks: int = 0
    """Ranks, of a verb that trains; 0 takes `pipeline.ranks`."""

    def __post_init__(self) -> None:
        at_least(self, 0, "ranks")
        one_of(self, "verb", (verb for verb in OUTPUTS if verb in VERBS))


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """The stages of a recipe, and which of them run."""

    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Name -> stage. A stage runs after those whose outputs it takes; otherwise the order is that of the recipe."""
    overrides: list[str] = field(default_factory=list)
    """key=value given to every stage that reads the key."""
    ranks: int = 0
    """Ranks of each training stage that says no number itself; 0 takes the fewest that `parallel` allows."""
    workers: int = 1
    """Stages that may run side by side on this machine, where neither depends on the other."""
    from_: str = ""
    """Run only this stage and those that depend on it; short form `from=STAGE`."""
    until: str = ""
    """Run only this stage and those that it depends on; short form `until=STAGE`."""
    only: str = ""
    """Run only this stage; short form `only=STAGE`."""
    dry_run: bool = False
    """Compose and check every stage, with its inputs and outputs, and run none; short form `dry_run=true`."""
    show: str = ""
    """list (what is done, stale or missing), graph (as text and as Mermaid) or table (the stages' main settings): print
    it and run nothing; short forms `--list`, `--graph`, `--table`."""

    def __post_init__(self) -> None:
        at_least(self, 0, "ranks")
        at_least(self, 1, "workers")
        one_of(self, "show", ("", "list", "graph", "table"))
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == REPLACED:
                raise ConfigError("stages", name, f"must be a name of letters, digits, _ and -, and not {REPLACED}")
            for need in stage.needs:
                self._check_stage(f"stages.{name}.needs", need)
            for key, written in stage.inputs.items():
                self.output_of(written, f"stages.{name}.inputs.{key}")
        for key, chosen in (("from", self.from_), ("until", self.until), ("only", self.only)):
            if chosen:
                self._check_stage(key, chosen)
        if self.only and (self.from_ or self.until):
            raise ConfigError("only", self.only, "must stand alone, without from= or until=")

    def output_of(self, written: str, key: str = "inputs") -> StageOutput:
        """The output that STAGE or STAGE.OUTPUT names.

        Args:
            key: configuration key to name in an error.

        Raises:
            ConfigError: there is no such stage or output, or the stage has several.
        """
        name, _, output = written.partition(".")
        self._check_stage(key, name)
        outputs = list(OUTPUTS[self.stages[name].verb])
        if not output and len(outputs) == 1:
            return StageOutput(name, outputs[0])
        if output not in outputs:
            raise ConfigError(key, written, f"must be one of {', '.join(f'{name}.{known}' for known in outputs)}")
        return StageOutput(name, output)

    def _check_stage(self, key: str, name: str) -> None:
        if name not in self.stages:
            raise ConfigError(key, name, f"must be one of {', '.join(self.stages)}")
