"""Searches all layouts of a job for the fastest that fit, and says why the others lose."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from megatron_r1.config.cross_checks import check_layout, check_sections
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.memory.activations import FP32
from megatron_r1.memory.chunks import PipelineRanks
from megatron_r1.memory.parts import GB, MemoryParts
from megatron_r1.memory.storage import host_memory_of_node
from megatron_r1.memory.trainer import fullest_rank, largest_pass
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.job import Stack, TrainingJob
from megatron_r1.plan.layouts import Fixed, layouts, recomputations
from megatron_r1.plan.pipeline_time import simulated_step
from megatron_r1.plan.published import NATURAL_IMBALANCE
from megatron_r1.plan.rollout import update_of
from megatron_r1.plan.step import StepTime, count, step_time

TIE = 0.03
"""Layouts whose steps differ by less than this share are equal as far as the model can say."""


SIMULATED = 24
"""Layouts, the first by the closed formulas of the pipeline, whose schedules are simulated."""


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """A layout with its memory and its time."""

    job: TrainingJob
    memory: MemoryParts
    """Of the pipeline rank that needs most."""
    time: StepTime | None = None
    """None where it does not fit."""
    host: MemoryParts = field(default_factory=MemoryParts)
    """Host memory of a node."""

    @property
    def layout(self) -> str:
        """The degrees, in a line."""
        degrees = self.job.config.parallel
        named = (("TP", degrees.tensor), ("PP", degrees.pipeline), ("VPP", degrees.virtual_pipeline),
                 ("EP", degrees.expert), ("ETP", degrees.expert_tensor), ("CP", degrees.context))  # fmt: skip
        words = [f"{name}{degree}" for name, degree in named if degree > 1 or name in ("TP", "PP", "EP")]
        return " ".join([*words, f"DP{self.job.data_parallel}"])

    @property
    def exceeds_host(self) -> bool:
        """Whether a node has too little host memory."""
        return self.host.total > self.job.gpu.host_memory_gb * GB

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.total if self.time else float("inf")


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found on a number of GPUs."""

    gpus: int
    best_first: list[PlannedLayout]
    """Fastest layout of each set of degrees that fits."""
    too_large: list[PlannedLayout]
    """Layouts that do not fit with any recomputation, the smallest first."""
    tried: int
    """Number of layouts that were tried."""

    def ties(self) -> list[PlannedLayout]:
        """Layouts as fast as the best, within `TIE`."""
        return [one for one in self.best_first if one.seconds <= (1 + TIE) * self.best_first[0].seconds]


def search(
    config: RunConfig, verb: str, gpus: int, constants: Constants, fixed: Fixed, stack: Stack | None = None
) -> Found:
    """All layouts on this many GPUs of `plan.gpu`, best first.

    Args:
        fixed: keys that keep their value.
        stack: the software stack; that of this project without one.

    Raises:
        ConfigError: keys contradict each other in every layout.
    """
    gpu = GPUS[config.plan.gpu]
    limit = config.plan.memory_share * gpu.memory_gb * GB
    fitting: dict[str, PlannedLayout] = {}
    too_large: list[PlannedLayout] = []
    tried, full, stages, degrees = 0, None, None, None
    for layout in layouts(config, verb, gpu, gpus, fixed):
        tried += 1
        if layout.parallel is not degrees or stages is None:  # micro-batches and overlaps share their degrees
            degrees, stages = layout.parallel, PipelineRanks(layout, verb)
        if full and full[0] == degrees and layout.train.micro_batch_size > full[1]:
            continue  # a smaller micro-batch did not fit
        job = TrainingJob(layout, gpu, gpus, imbalance(config), stack or Stack())
        smallest, found = _smallest(job, verb, limit, fixed, stages)
        if found is None:
            too_large.append(smallest)
            full = degrees, layout.train.micro_batch_size
            continue
        timed = PlannedLayout(found.job, found.memory, step_time(count(update_of(found.job, verb)), constants))
        if timed.seconds < fitting[timed.layout].seconds if timed.layout in fitting else True:
            fitting[timed.layout] = timed
    ordered = [_with_host(one, verb) for one in sorted(fitting.values(), key=lambda one: one.seconds)]
    too_large += [one for one in ordered if one.exceeds_host]
    allowed = _allowed([one for one in ordered if not one.exceeds_host], verb)
    simulated = [_simulated(one, verb, constants) for one in allowed[:SIMULATED]]
    simulated.sort(key=lambda one: one.seconds)
    return Found(gpus, simulated + allowed[SIMULATED:], sorted(too_large, key=lambda one: one.memory.total), tried)


def _with_host(candidate: PlannedLayout, verb: str) -> PlannedLayout:
    """With the host memory of a node."""
    job = candidate.job
    return replace(candidate, host=host_memory_of_node(job.config, job.ranks, verb, job.gpu.per_node))


def _simulated(candidate: PlannedLayout, verb: str, constants: Constants) -> PlannedLayout:
    """With the pipeline simulated."""
    return replace(candidate, time=simulated_step(count(update_of(candidate.job, verb)), constants))


def smallest_cluster(
    config: RunConfig, verb: str, constants: Constants, fixed: Fixed, stack: Stack | None = None
) -> Found:
    """The search on the fewest GPUs on which a layout fits: whole nodes, doubled until one does."""
    gpu = GPUS[config.plan.gpu]
    gpus = gpu.per_node
    found = search(config, verb, gpus, constants, fixed, stack)
    while not found.best_first and gpus < config.plan.most_gpus:
        gpus *= 2
        found = search(config, verb, gpus, constants, fixed, stack)
    return found


def imbalance(config: RunConfig) -> float:
    """Tokens of the busiest rank over the mean, as configured or by the kind of router."""
    if not config.model.moe.num_experts:
        return 1.0
    return config.plan.imbalance or NATURAL_IMBALANCE[config.model.moe.score_function]


def _smallest(
    job: TrainingJob, verb: str, limit: float, fixed: Fixed, stages: PipelineRanks
) -> tuple[PlannedLayout, PlannedLayout | None]:
    """The smallest that the layout can be, and the layout with the cheapest recomputation that fits."""
    options = list(recomputations(job.config, fixed))
    smallest = _with_memory(job, options[-1], verb, stages)
    if smallest.memory.total > limit:
        return smallest, None
    for config in options[:-1]:
        candidate = _with_memory(job, config, verb, stages)
        if candidate.memory.total <= limit:
            return candidate, candidate
    return smallest, smallest


def _with_memory(job: TrainingJob, config: RunConfig, verb: str, stages: PipelineRanks) -> PlannedLayout:
    work = largest_pass(config, verb, job.data_parallel, job.imbalance)
    memory = fullest_rank(config, verb, job.ranks, work, stages)
    if "gradients" in memory.parts:  # another trainer's may be smaller than fp32
        memory.parts["gradients"] *= job.stack.gradient_bytes / FP32
    return PlannedLayout(replace(job, config=config), memory)


def _allowed(ordered: list[PlannedLayout], verb: str) -> list[PlannedLayout]:
    """Without layouts that a rule of several sections refuses.

    Raises:
        ConfigError: such a rule refuses all of them, so that the layout is not what is wrong.
    """
    found, refused = [], None
    for candidate in ordered:
        try:
            check_sections(candidate.job.config, verb)
            check_layout(candidate.job.config, verb, candidate.job.ranks)
        except ConfigError as error:
            refused = refused or error
            continue
        found.append(candidate)
    if refused and not found:
        raise refused
    return found


def why_slower(candidate: PlannedLayout, best: PlannedLayout) -> str:
    """The part of the step that costs a layout most against the best one."""
    if candidate.time is None or best.time is None:
        return ""
    more = {item.name: getattr(candidate.time, item.name) - getattr(best.time, item.name) for item in fields(StepTime)}
    name = max(more, key=lambda part: more[part])
    return f"{candidate.seconds / best.seconds - 1:+.1%}: {PARTS[name]} {more[name]:+.3g} s"


PARTS = {
    "compute": "computation",
    "exchange": "exchange of tokens between experts",
    "bubble": "waiting in the pipeline",
    "gradients": "gradients and weights between ranks",
    "optimizer": "optimizer",
}
"""Part of a step -> its name in tables."""


def why_too_large(candidate: PlannedLayout, limit: float) -> str:
    """What fills the memory of a layout that does not fit."""
    memory, where = candidate.memory, ""
    if candidate.exceeds_host:
        memory, where, limit = candidate.host, " of host memory", candidate.job.gpu.host_memory_gb * GB
    name, amount = max(memory.parts.items(), key=lambda part: part[1])
    return f"{memory.total / GB:.0f} GB{where} where {limit / GB:.0f} are: {name} {amount / GB:.0f} GB"
