"""A plan as a table in the terminal, as JSON, and as the arguments of `submit`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.run import RunConfig
from megatron_r1.config.verbs import VERBS, JobCommand
from megatron_r1.files import write_whole
from megatron_r1.memory.parts import GB
from megatron_r1.memory.trainer import job_memory, largest_pass
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.cost import Cost
from megatron_r1.plan.layouts import changed_keys
from megatron_r1.plan.pictures.page import html_page
from megatron_r1.plan.pictures.terminal import terminal_pipeline
from megatron_r1.plan.pipeline.orders import build_schedule
from megatron_r1.plan.pipeline.simulate import Timeline, simulate
from megatron_r1.plan.pipeline_time import durations_of, schedule_of
from megatron_r1.plan.rollout import update_of
from megatron_r1.plan.search import PARTS, TIE, Found, PlannedLayout, why_slower, why_too_large
from megatron_r1.plan.serving import UNCERTAINTY
from megatron_r1.plan.split import Split
from megatron_r1.plan.step import count

WIDTH, BAR = 150, 40
ARGUMENTS = "submit.args"


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What was found for a command."""

    command: JobCommand
    config: RunConfig
    """The command's configuration, before a layout was chosen."""
    found: Found
    cost: Cost
    constants: Constants
    uncertainty: float
    """Relative error to expect of a step's seconds."""
    split: Split | None = None
    """Of reinforcement learning: which nodes train."""

    @property
    def best(self) -> PlannedLayout:
        return self.found.best_first[0]

    @property
    def nodes(self) -> int:
        trainer = -(-self.found.gpus // GPUS[self.config.plan.gpu].per_node)
        return trainer + (self.split.engine_nodes if self.split else 0)


def write(plan: JobPlan, folder: Path) -> None:
    """Write plan.json, the arguments of `submit`, and plan.html into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "plan.json", orjson.dumps(as_json(plan), option=orjson.OPT_INDENT_2))
    write_whole(folder / ARGUMENTS, "\n".join([*submit_arguments(plan), ""]).encode())
    write_whole(folder / "plan.html", _page(plan).encode())


def _page(plan: JobPlan) -> str:
    """Pipeline and memory of the best layout."""
    best, cost = plan.best, plan.cost
    facts = [
        ("layout", best.layout),
        ("changes", " ".join(changed_keys(best.job.config, plan.config))),
        ("step", f"{best.seconds:.3g} s, within {plan.uncertainty:.0%}"),
        ("run", f"{cost.days:.3g} days, {cost.gpu_hours:,.0f} GPU hours"),
    ]
    title = f"{plan.command.verb} on {plan.found.gpus} {plan.config.plan.gpu}"
    limit = GPUS[plan.config.plan.gpu].memory_gb * GB
    memory = job_memory(
        best.job.config,
        plan.command.verb,
        best.job.ranks,
        largest_pass(best.job.config, plan.command.verb, best.job.data_parallel, best.job.imbalance),
        True,
    )
    return html_page(title, timeline(plan), memory, limit, facts)


def timeline(plan: JobPlan) -> Timeline:
    """Every pass of a step of the best layout."""
    counted = count(update_of(plan.best.job, plan.command.verb))
    return simulate(build_schedule(schedule_of(counted.job)), durations_of(counted, plan.constants))


def submit_arguments(plan: JobPlan) -> list[str]:
    """Arguments of `submit` for the best layout, one a line: `megatron-r1 submit @FILE`."""
    own = dict(VERBS["plan"].short_forms)
    changed = changed_keys(plan.best.job.config, plan.config)
    keys = {line.partition("=")[0] for line in changed}
    given = [
        line
        for line in plan.command.overrides
        if (key := line.lstrip("+~").partition("=")[0]).partition(".")[0] != "plan" and key not in (*own, *keys)
    ]
    gpu = GPUS[plan.config.plan.gpu]
    beside = plan.split.engine_gpus if plan.split and not plan.split.engine_nodes else 0
    on_a_node = min(plan.found.gpus + beside, gpu.per_node)
    machine = [f"cluster.gpu={plan.config.plan.gpu}", f"cluster.gpus_per_node={on_a_node}", f"nodes={plan.nodes}"]
    if plan.split:
        tensor = plan.split.engines.tensor
        changed += [f"rollout.sglang.server.tensor_parallel={tensor}"] * (tensor != _tensor(plan.config))
        if plan.split.engine_nodes:
            machine += [f"engine_nodes={plan.split.engine_nodes}"]
        else:
            changed += [f"rollout.sglang.servers={plan.split.engines.servers}"]
        machine += [f"cluster.ranks_per_node={plan.found.gpus}"] * bool(beside)
    return [plan.command.verb, "--config-name", plan.command.recipe, *given, *changed, *machine]


def _tensor(config: RunConfig) -> int:
    return config.rollout.sglang.server.tensor_parallel


def as_json(plan: JobPlan) -> dict[str, Any]:
    """All that the plan says, for other programs."""
    return {
        "verb": plan.command.verb,
        "recipe": plan.command.recipe,
        "gpu": plan.config.plan.gpu,
        "gpus": plan.found.gpus,
        "nodes": plan.nodes,
        "layouts_tried": plan.found.tried,
        "layouts": [_candidate(one, plan) for one in plan.found.best_first[:50]],
        "too_large": [_candidate(one, plan) for one in plan.found.too_large[:10]],
        "cost": asdict(plan.cost),
        "submit": submit_arguments(plan) if plan.found.best_first else [],
        "constants": asdict(plan.constants),
        "uncertainty": plan.uncertainty,
        "reinforcement": _split(plan.split) if plan.split else {},
    }


def _where(split: Split) -> str:
    if split.engine_nodes:
        return f"{split.engine_nodes} nodes"
    return f"{split.engine_gpus} GPUs of the same node" if split.engine_gpus else "the trainer's first node"


def _split(split: Split) -> dict[str, Any]:
    step = split.step
    return {
        "engine_nodes": split.engine_nodes,
        "engine_gpus": split.engine_gpus,
        "engines": asdict(split.engines),
        "step_seconds": step.total,
        "phases": asdict(step),
        "trainer_idle": step.trainer_idle,
        "engine_idle": step.engine_idle,
    }


def _candidate(one: PlannedLayout, plan: JobPlan) -> dict[str, Any]:
    config = one.job.config
    found: dict[str, Any] = {
        "layout": one.layout,
        "overrides": changed_keys(config, plan.config),
        "memory_bytes": {name: round(amount) for name, amount in one.memory.parts.items()},
        "memory_total_bytes": round(one.memory.total),
        "host_memory_of_node_bytes": {name: round(amount) for name, amount in one.host.parts.items()},
    }
    if one.time:
        train = update_of(one.job, plan.command.verb).config.train
        tokens = train.global_batch_size * train.sequence_length
        found |= {
            "step_seconds": one.seconds,
            "step_parts": {name: getattr(one.time, name) for name in PARTS},
            "tokens_per_second_per_gpu": tokens / one.seconds / one.job.ranks,
        }
    return found


def show(plan: JobPlan, seconds: float) -> None:
    """Print the plan: the best layouts, why the others lose, memory, cost."""
    console = wide_console()
    show_layouts(plan.found, plan.config, plan.command.verb, console)
    if plan.best.job.config.parallel.pipeline > 1:
        console.print(terminal_pipeline(timeline(plan)))
    _show_memory(plan, console)
    _show_cost(plan, console)
    sure = f"within {plan.uncertainty:.0%} for published steps"
    if plan.split:
        sure = f"within {UNCERTAINTY:.0%} for most published steps of other software"
    console.print(
        f"{plan.found.tried} layouts in {seconds:.1f} s; the seconds of a step are {sure} (megatron_r1/plan/README.md)"
    )


def wide_console() -> Console:
    """A terminal, or a file with room for the tables."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH if not console.is_terminal else 0)
    return console


def show_layouts(found: Found, config: RunConfig, verb: str, console: Console) -> None:
    """The layouts, best first, and the smallest of those that do not fit."""
    limit = config.plan.memory_share * GPUS[config.plan.gpu].memory_gb * GB
    table = Table(title=f"{found.gpus} {config.plan.gpu}", title_justify="left")
    for column in ("layout", "micro-batch", "recomputed", "step", "tokens/s/GPU", "memory", "why not"):
        table.add_column(column, overflow="fold")
    for number, one in enumerate(found.best_first[: config.plan.layouts]):
        update, performance = update_of(one.job, verb), one.job.config.performance
        train = update.config.train
        tokens = train.global_batch_size * train.sequence_length
        overlap = " +overlap" if performance.overlap_moe_expert_parallel_comm else ""
        why = "" if number == 0 else why_slower(one, found.best_first[0])
        tie = "tie, " if number and one in found.ties() else ""
        table.add_row(
            one.layout, f"{train.micro_batch_size} x {update.micro_batches}{overlap}",
            ", ".join(performance.recompute_modules), f"{one.seconds:.3g} s",
            f"{tokens / one.seconds / one.job.ranks:,.0f}", f"{one.memory.total / GB:.0f} GB", tie + why,
        )  # fmt: skip
    for one in found.too_large[: max(1, config.plan.layouts // 2)]:
        train, names = one.job.config.train, one.job.config.performance.recompute_modules
        table.add_row(one.layout, f"{train.micro_batch_size} x {one.job.micro_batches}", ", ".join(names), "-", "-",
                      f"{one.memory.total / GB:.0f} GB", why_too_large(one, limit), style="red")  # fmt: skip
    console.print(table)
    if len(found.ties()) > 1:
        console.print(f"within {TIE:.0%} of the best: {len(found.ties())} layouts")


def _show_memory(plan: JobPlan, console: Console) -> None:
    parts = sorted(plan.best.memory.parts.items(), key=lambda part: -part[1])
    most = GPUS[plan.config.plan.gpu].memory_gb * GB
    console.print(f"memory of the fullest rank, {plan.best.memory.total / GB:.1f} of {most / GB:.0f} GB:")
    for name, amount in parts:
        console.print(f"  {name:24} {amount / GB:7.2f} GB  {'█' * round(BAR * amount / most)}")


def _show_cost(plan: JobPlan, console: Console) -> None:
    cost, time = plan.cost, plan.best.time
    if plan.split:
        step, engines = plan.split.step, plan.split.engines
        console.print(
            f"step of reinforcement learning, {step.total:.3g} s {'ahead' if step.ahead else 'in turns'}: rollout "
            f"{step.rollout:.3g}, rewards {step.rewards:.3g}, log-probabilities {step.logprobs:.3g}, update "
            f"{step.update:.3g}, weight sync {step.sync:.3g}, memory to the host and back {step.memory:.3g}; idle: "
            f"trainer {step.trainer_idle:.0%}, engines "
            f"{step.engine_idle:.0%}; {engines.servers} servers of {engines.tensor} GPUs on "
            f"{_where(plan.split)}"
        )
    if time:
        parts = ", ".join(f"{text} {getattr(time, name):.3g}" for name, text in PARTS.items() if getattr(time, name))
        console.print(f"seconds of a step, {time.total:.3g}: {parts}")
    money = f", {cost.money:,.0f} at {plan.config.plan.gpu_hour_price:g} an hour" if cost.money else ""
    console.print(f"{cost.steps:,.0f} steps: {cost.days:.3g} days, {cost.gpu_hours:,.0f} GPU hours{money}")
    console.print(
        f"checkpoint: {cost.checkpoint_seconds:.3g} s to write; save every {cost.save_every_steps} steps "
        f"({cost.save_every_seconds:.0f} s): failures and saving then take {cost.lost_share:.2%} of the time"
    )
    console.print(escape(f"submit: megatron-r1 submit @{_folder(plan) / ARGUMENTS}"))


def _folder(plan: JobPlan) -> Path:
    return Path(plan.config.root) / plan.config.name / "plan"
