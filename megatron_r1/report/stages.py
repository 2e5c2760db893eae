"""The figures of a stage by kind, with their metrics. Captions and units come from the registry of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.report.figures import Rows, by_minutes, comparison, curves, heat_map, stacked_times
from megatron_r1.report.read import Stage
from megatron_r1.track.metrics import PHASE_SECONDS, find


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Curves:
    """A figure with a line per metric that was recorded."""

    name: str
    title: str
    """Quantity on the axis, without the unit."""
    metrics: Mapping[str, str]
    """Metric -> its label in the legend."""
    log: bool = False
    unit: str = ""
    """Unit on the axis where the registry's is not enough."""

    def drawn(self, stage: Stage) -> Figure:
        unit = self.unit or find(next(iter(self.metrics))).unit
        ylabel = f"{self.title} ({unit})" if unit else self.title
        svg = curves(f"{stage.name}-{self.name}", stage.rows, dict(self.metrics), ylabel, log=self.log)
        return Figure(svg, self.caption(stage.rows))

    def caption(self, rows: Rows) -> str:
        """The registry's meaning of each recorded metric, with its label where there are several."""
        shown = [metric for metric in self.metrics if any(metric in row for row in rows)]
        meanings = {metric: find(metric).meaning for metric in shown}
        if len(meanings) == 1:
            return meanings[shown[0]]
        return " ".join(f"{self.metrics[metric].capitalize()}: {meaning}" for metric, meaning in meanings.items())


NORM = Curves("norm", "gradient norm", {"train/gradient_norm": "gradient norm"}, log=True)
RATE = Curves("rate", "learning rate", {"train/learning_rate": "learning rate"})
CURVES: Mapping[str, tuple[Curves, ...]] = {
    "pretrain": (
        Curves(
            "loss", "loss", {"train/loss": "next token", "train/mtp_loss": "token after next"}, unit="nats per token"
        ),
        NORM,
        RATE,
        Curves("speed", "throughput", {"perf/tokens_per_second": "throughput"}),
        Curves("load", "load", {"moe/load_max": "busiest expert", "moe/mtp_load_max": "of multi-token layers"}),
        Curves(
            "violation", "violation", {"moe/max_violation": "backbone", "moe/mtp_max_violation": "multi-token layers"}
        ),
    ),
    "sft": (
        Curves(
            "loss",
            "loss",
            {
                "train/loss": "training",
                "eval/loss": "held out",
                "train/mtp_loss": "token after next",
                "train/cross_entropy": "tokens of the data",
                "train/distillation_loss": "divergence from the teacher",
            },
            unit="nats per token",
        ),
        Curves("tokens", "tokens of a step", {"train/tokens": "all", "train/loss_tokens": "in the loss"}),
        Curves("packing", "packing", {"train/packing_efficiency": "packing"}),
        Curves("imbalance", "imbalance", {"train/token_imbalance": "fullest rank"}),
        NORM,
        RATE,
    ),
    "reward_model": (
        Curves("loss", "loss", {"train/score_loss": "scores", "train/reasoning_loss": "reasoning"}, unit="nats"),
        Curves("accuracy", "accuracy", {"train/accuracy": "training", "eval/accuracy": "held out"}),
        Curves("margin", "margin", {"train/margin": "margin"}),
    ),
    "preference": (
        Curves("loss", "loss", {"train/loss": "loss"}, unit="nats per pair; 0.69 where policy and reference agree"),
        Curves("accuracy", "accuracy", {"train/accuracy": "training", "eval/accuracy": "held out"}),
        Curves("margin", "margin", {"train/margin": "training", "eval/margin": "held out"}),
        Curves("rewards", "implicit reward", {"train/chosen_reward": "chosen", "train/rejected_reward": "rejected"}),
    ),
    "rl": (
        Curves(
            "reward",
            "mean over a rollout",
            {"rollout/reward": "reward", "rollout/accuracy": "accuracy", "rollout/format": "format"},
            unit="reward, share",
        ),
        Curves("length", "response length", {"rollout/response_length": "response length"}),
        Curves("language", "mixed languages", {"rollout/mixed_language": "mixed languages"}),
        Curves("reflection", "reflection words", {"rollout/reflection_words": "reflection words"}),
        Curves("kl", "KL", {"policy/kl": "KL"}),
        Curves("entropy", "entropy", {"policy/entropy": "entropy"}),
        Curves("idle", "idle", {"perf/trainer_idle": "trainer", "perf/engine_idle": "engine"}),
        Curves(
            "stale",
            "staleness",
            {"rollout/staleness_max": "oldest token", "rollout/staleness_mean": "mean"},
        ),
        Curves("ratio", "ratio", {"policy/ratio": "change ratio", "policy/ratio_clipped": "limited change ratio"}),
        Curves("objective", "objective", {"policy/objective": "smaller of", "policy/kl_loss": "stay-stable part"}),
        Curves("clip", "clipped", {"policy/clip_fraction": "clipped"}),
        NORM,
        Curves("value", "critic's loss", {"critic/loss": "critic"}, log=True),
        Curves("explained", "explained variance", {"critic/explained_variance": "explained"}),
        Curves("gap", "log-probability gap", {"mismatch/logprob_max_abs": "gap"}, log=True),
        Curves(
            "requests",
            "requests",
            {"rollout/requests_failed": "failed", "rollout/requests_resent": "sent again"},
        ),
    ),
}


def figures_of(stage: Stage) -> list[Figure]:
    """All figures for which the stage's rows have metrics."""
    more: Callable[[Stage], Iterable[Figure]] = MORE.get(stage.kind, _nothing)
    return _shown([*(each.drawn(stage) for each in CURVES[stage.kind]), *more(stage), _times(stage)])


def figures_beside(kind: str, stages: Iterable[Stage]) -> list[Figure]:
    """Figures that compare several stages of a kind, with a line per stage."""
    rows = {stage.name: stage.rows for stage in stages}
    beside: Callable[[Mapping[str, Rows]], Iterable[Figure]] = BESIDE.get(kind, _nothing)
    return _shown(beside(rows))


def figures_over_training(name: str, results: Mapping[str, Any]) -> list[Figure]:
    """The curves of an evaluation that followed a run over its checkpoints; none of another evaluation."""
    curve = results.get("curve")
    if not isinstance(curve, Mapping):
        return []
    drawn = []
    for titles, ylabel in OVER_TRAINING:
        rows: dict[int, dict[str, Any]] = {}
        for metric in titles:
            for point in curve.get(metric, ()):
                rows.setdefault(point["step"], {"step": point["step"]})[metric] = point["mean"]
        svg = curves(f"{name}-{next(iter(titles))}", [rows[step] for step in sorted(rows)], titles, ylabel)
        drawn.append(Figure(svg, f"{name}: mean over held-out prompts at each kept checkpoint."))
    return _shown(drawn)


OVER_TRAINING: tuple[tuple[dict[str, str], str], ...] = (
    (
        {"correct_any_format": "correct", "correct_tagged": "correct, tagged", "helpful": "helpful", "safe": "safe"},
        "pass@1 (share)",
    ),
    ({"mixed_language": "mixed languages", "format": "format"}, "share of responses"),
    ({"language": "language"}, "share of the reasoning's words in the target language"),
    ({"response_length": "length"}, "response length (tokens)"),
    ({"reflection_words": "reflection words"}, "reflection words in a response"),
)


def _nothing(_: Any) -> Iterable[Figure]:
    return ()


def _shown(figures: Iterable[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.svg]


def _expert_loads(stage: Stage) -> Iterable[Figure]:
    """The last recorded table of the experts' loads by layer."""
    tables = ((row["step"], row["moe/load"]) for row in reversed(stage.rows) if isinstance(row.get("moe/load"), dict))
    step, table = next(tables, (0, {}))
    svg = heat_map(f"{stage.name}-experts", table, "expert", "tokens (1 is an even share)")
    yield Figure(svg, f"Step {step}. {find('moe/load').meaning}")


def _times(stage: Stage) -> Figure:
    svg = stacked_times(f"{stage.name}-time", stage.rows)
    return Figure(svg, "Where the time of a step goes, by phase; a save counts to the step after it.")


def _pretrain_beside(rows: Mapping[str, Rows]) -> Iterable[Figure]:
    svg = comparison("all-loss", rows, "train/loss", "loss (nats per token)")
    yield Figure(svg, f"Each stage. {find('train/loss').meaning}")
    svg = comparison("all-load", rows, "moe/load_max", "load of the busiest expert")
    yield Figure(svg, f"Each stage. {find('moe/load_max').meaning}")


def _rl_beside(rows: Mapping[str, Rows]) -> Iterable[Figure]:
    accuracy = find("rollout/accuracy")
    yield Figure(comparison("all-accuracy", rows, accuracy.name, "accuracy"), f"Each stage. {accuracy.meaning}")
    timed = {name: by_minutes(of_stage) for name, of_stage in rows.items()}
    svg = comparison("all-minutes", timed, accuracy.name, "accuracy", xlabel="minutes")
    yield Figure(svg, "The same over the time that each stage took.")
    svg = comparison("all-update-seconds", rows, f"{PHASE_SECONDS}update", "updates (seconds per step)")
    yield Figure(svg, "Each stage. Time of a step in updates: passes over micro-batches.")


MORE: Mapping[str, Callable[[Stage], Iterable[Figure]]] = {"pretrain": _expert_loads}
BESIDE: Mapping[str, Callable[[Mapping[str, Rows]], Iterable[Figure]]] = {
    "pretrain": _pretrain_beside,
    "rl": _rl_beside,
}
