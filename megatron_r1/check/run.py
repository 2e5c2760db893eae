"""Runs all checks of a job."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from megatron_r1.check import data, layout, memory, model, rewards, rules, schedules, slurm, storage
from megatron_r1.check.finding import Check, Finding, Job, State, finding_of, unknown
from megatron_r1.check.rules import broken_rules, check_of
from megatron_r1.config.keys import check_overrides, check_recipe
from megatron_r1.config.load import load_sections
from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import JobCommand
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.pipeline.compose import ComposedStage, compose_stages
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.source import find_model

PARTS = (rules, layout, schedules, model, memory, storage, data, rewards, slurm)
CHECKS: tuple[Check, ...] = tuple(sorted((one for part in PARTS for one in part.CHECKS), key=lambda one: one.number))


@dataclass(slots=True)
class Report:
    """What all checks found."""

    findings: dict[int, list[Finding]] = field(default_factory=dict)
    """Number of a check -> what it found; a check that does not apply has no entry."""
    readable: bool = True
    """Whether the configuration could be read; if not, only what it lacks is known."""

    def add(self, number: int, found: Iterable[Finding]) -> None:
        """Add what a check found, once."""
        known = self.findings.setdefault(number, [])
        known.extend(finding for finding in dict.fromkeys(found) if finding not in known)

    def state(self, number: int) -> State:
        """The worst that a check found."""
        if number not in self.findings:
            return State.NOT_APPLICABLE
        return max((finding.state for finding in self.findings[number]), default=State.PASSED)

    @property
    def refused(self) -> list[int]:
        """Numbers of the checks that refuse the job."""
        return [check.number for check in CHECKS if self.state(check.number) is State.REFUSED]


def check_command(command: JobCommand) -> Report:
    """Run all checks of a command; its overrides may set keys of `check`, which describe the machine."""
    report = Report()
    config, errors, model_known = _loaded(command)
    for error in errors:
        report.add(check_of(error), [finding_of(error)])
    if config is None:
        _mark_unchecked(report)
    elif command.verb == "pipeline":
        _check_stages(report, config)
    else:
        _run_all(report, Job(command.verb, config, model_known=model_known))
    return report


def _check_stages(report: Report, config: RunConfig) -> None:
    """Run all checks of each stage of a recipe; what earlier stages make need not be there."""
    report.add(rules.KEYS, map(finding_of, broken_rules(Job("pipeline", config))))
    try:
        stages = compose_stages(config, run_folder(config))
    except UserError as error:
        report.add(rules.KEYS, [finding_of(error)])
        return
    made: list[str] = []
    for name, stage in stages.items():
        found = Report()
        _run_all(found, _job_of_stage(stage, tuple(made), config))
        for number, findings in found.findings.items():
            report.add(number, [_of_stage(name, one) for one in findings if one.state is not State.PASSED])
        made += [stage.path_of(output) for output in stage.makes()]


def _job_of_stage(stage: ComposedStage, made: tuple[str, ...], recipe: RunConfig) -> Job:
    """A stage as a job, on as many nodes as it needs where the command names none for the whole recipe."""
    if recipe.check.ranks and stage.verb in TRAINING_VERBS:
        stage = replace(stage, ranks=recipe.check.ranks)
    machine = replace(recipe.check, ranks=stage.ranks)
    job = Job(stage.verb, replace(stage.config, check=machine), made)
    if job.on_gpus and not machine.nodes:
        with suppress(ConfigError):  # which the check of its servers says
            nodes = stage.nodes(machine.gpus_per_node, machine.gpus_per_node).total
            return replace(job, config=replace(job.config, check=replace(machine, nodes=nodes)))
    return job


def _of_stage(name: str, finding: Finding) -> Finding:
    return replace(finding, text=f"stage {name}: {finding.text}")


def _loaded(command: JobCommand) -> tuple[RunConfig | None, list[UserError], bool]:
    """The configuration without checks of several sections together, what was refused, and whether the model is known.

    The model is that of the weights that the command names, where they are as they must be.
    """
    errors: list[UserError] = []
    try:
        check_overrides(command.verb, [line for line in command.overrides if not line.startswith("check.")])
        check_recipe(command.verb, command.recipe)
    except UserError as error:
        errors.append(error)
    for find in (find_model, None):
        try:
            loaded = load_sections(command.verb, command.overrides, command.recipe, find)
            return loaded.config, errors, find is not None
        except UserError as error:
            if str(error) not in map(str, errors):
                errors.append(error)
    return None, errors, False


def _run_all(report: Report, job: Job) -> None:
    for check in CHECKS:
        if check.applies(job):
            report.add(check.number, check.find(job))
    known = {finding for findings in report.findings.values() for finding in findings}
    for error in broken_rules(job):  # some checks apply a rule themselves
        if (finding := finding_of(error)) not in known:
            report.add(check_of(error), [finding])
    for number in job.config.check.warn_only:
        report.findings[number] = [_softened(finding) for finding in report.findings.get(number, ())]


def _softened(finding: Finding) -> Finding:
    return replace(finding, state=State.WARNING) if finding.state is State.REFUSED else finding


def _mark_unchecked(report: Report) -> None:
    report.readable = False
    for check in CHECKS:
        if check.number not in report.findings:
            report.add(check.number, [unknown("not checked: the configuration has an error", "mend it first")])
