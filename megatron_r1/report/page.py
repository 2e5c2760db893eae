"""The report of a recipe: one HTML page that needs nothing but itself.

Promises that text from models and files is shown, never interpreted, and that what is missing is said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from megatron_r1.files import write_whole
from megatron_r1.report import results
from megatron_r1.report.figures import by_minutes, comparison, curves, heat_map, time_shares
from megatron_r1.report.preferences import preference_figures
from megatron_r1.report.read import Recipe, Stage, read_recipe
from megatron_r1.report.reward_models import reward_model_figures
from megatron_r1.report.style import CSS

# Nothing is loaded and nothing runs, whatever a model may have written.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(pipeline_folder: Path, out: Path) -> None:
    """Writes the page of the recipe that ran in `pipeline_folder` to `out`, replacing it as a whole."""
    page = render(read_recipe(pipeline_folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page.encode("utf-8", "replace"))


def render(recipe: Recipe) -> str:
    """The page, section by section."""
    stages = ", ".join(escape(stage.name) for stage in recipe.stages) or "no stage has run yet"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        f"<h1>{escape(recipe.name)}</h1>",
        f'<p class="dim">Stages: {stages}. Written {written}.</p>',
        "<h2>Before and after</h2>" + results.headline(recipe.results),
        "<h2>Pre-training</h2>" + _pretrain_together(recipe) + _of_kind(recipe, "pretrain", _pretrain_figures),
        *_if_any(recipe, "Supervised fine-tuning", "sft", _sft_figures),
        *_if_any(recipe, "Reward models", "reward_model", reward_model_figures),
        *_if_any(recipe, "Direct preference optimization", "preference", preference_figures),
        "<h2>Reinforcement learning</h2>" + _rl_together(recipe) + _of_kind(recipe, "rl", _rl_figures),
        "<h2>Answers before and after</h2>" + results.answers(recipe.samples, list(recipe.results.get("models", {}))),
        "<h2>Configuration and versions</h2>" + _settings(recipe.stages),
        "<h2>Files</h2>" + _files(recipe.files),
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(recipe.name)}: report</title><style>{CSS}</style>"
    )
    main = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{main}\n</main></body></html>\n'


def _of_kind(recipe: Recipe, kind: str, figures_of: Callable[[Stage], Iterable[str]]) -> str:
    parts = []
    for stage in recipe.of_kind(kind):
        figures = "".join(figures_of(stage))
        last = stage.rows[-1]["step"]
        parts.append(f'<h3>{escape(stage.name)}</h3><p class="dim">{len(stage.rows)} rows, up to step {last}.</p>')
        parts.append(f'<div class="figures">{figures}</div>')
    return "".join(parts) or results.missing("No stage of this kind has recorded anything.")


def _rl_together(recipe: Recipe) -> str:
    """What several stages of reinforcement learning have in common, in one figure each."""
    stages = recipe.of_kind("rl")
    runs = {stage.name: stage.rows for stage in stages}
    figures = _figure(
        comparison("all-accuracy", runs, "rollout/accuracy", "accuracy"),
        "Share of right answers in each stage's rollouts.",
    )
    timed = {stage.name: by_minutes(stage.rows) for stage in stages}
    caption = "The same over the time that each stage took."
    figures += _figure(comparison("all-minutes", timed, "rollout/accuracy", "accuracy", xlabel="minutes"), caption)
    caption = "What the trainer needs for a step, a critic's share included."
    figures += _figure(
        comparison("all-train-seconds", runs, "perf/train_seconds", "trainer (seconds per step)"), caption
    )
    return f'<div class="figures">{figures}</div>' if figures else ""


def _pretrain_together(recipe: Recipe) -> str:
    """What several pre-training stages have in common, in one figure each."""
    runs = {stage.name: stage.rows for stage in recipe.of_kind("pretrain")}
    figures = _figure(
        comparison("all-loss", runs, "train/loss", "loss (nats per token)"), "Training loss of each stage."
    )
    caption = "Load of the busiest expert of any layer; 1 is an even share."
    figures += _figure(comparison("all-load", runs, "moe/load_max", "load of the busiest expert"), caption)
    return f'<div class="figures">{figures}</div>' if figures else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""


def _pretrain_figures(stage: Stage) -> Iterable[str]:
    name, rows = stage.name, stage.rows
    loss = {"train/loss": "next token", "train/mtp_loss": "token after next"}
    yield _figure(curves(f"{name}-loss", rows, loss, "loss (nats per token)"), "Training loss.")
    norm = {"train/gradient_norm": "gradient norm"}
    yield _figure(curves(f"{name}-norm", rows, norm, "gradient norm", log=True), "Gradient norm before clipping.")
    rate = {"train/learning_rate": "learning rate"}
    yield _figure(curves(f"{name}-rate", rows, rate, "learning rate"), "Learning-rate schedule.")
    speed = {"perf/tokens_per_second": "tokens per second"}
    yield _figure(curves(f"{name}-speed", rows, speed, "tokens per second"), "Throughput of training.")
    load = {"moe/load_max": "busiest expert", "moe/mtp_load_max": "of multi-token layers"}
    caption = "Load of the busiest expert of any layer in each step; 1 is an even share."
    yield _figure(curves(f"{name}-load", rows, load, "load of the busiest expert"), caption)
    violation = {"moe/max_violation": "backbone", "moe/mtp_max_violation": "multi-token layers"}
    caption = "What the busiest expert has above an even share over a window of steps (MaxVio); 0 is balance."
    yield _figure(curves(f"{name}-violation", rows, violation, "violation over a window"), caption)
    step, table = _last_loads(rows)
    caption = f"Tokens per expert in step {step}, as multiples of an even share."
    yield _figure(heat_map(f"{name}-experts", table, "expert", "tokens (1 is an even share)"), caption)


def _last_loads(rows: Sequence[dict[str, Any]]) -> tuple[int, dict[str, list[float]]]:
    """The last recorded table of the experts' loads by layer, and its step."""
    tables = ((row["step"], row["moe/load"]) for row in reversed(rows) if isinstance(row.get("moe/load"), dict))
    return next(tables, (0, {}))


def _if_any(recipe: Recipe, title: str, kind: str, figures_of: Callable[[Stage], Iterable[str]]) -> Iterable[str]:
    """A section, in recipes that have stages of its kind."""
    if recipe.of_kind(kind):
        yield f"<h2>{title}</h2>" + _of_kind(recipe, kind, figures_of)


def _sft_figures(stage: Stage) -> Iterable[str]:
    name, rows = stage.name, stage.rows
    loss = {"train/loss": "learned", "eval/loss": "held out", "train/mtp_loss": "token after next"}
    loss |= {"train/cross_entropy": "written words", "train/distillation_loss": "divergence from the teacher"}
    caption = "Loss on the answers' tokens, of what is learned and of what is held out."
    yield _figure(curves(f"{name}-loss", rows, loss, "loss (nats per token)"), caption)
    tokens = {"train/tokens": "all", "train/loss_tokens": "learned"}
    yield _figure(curves(f"{name}-tokens", rows, tokens, "tokens per step"), "Tokens of a step, padding left out.")
    packing = {"train/packing_efficiency": "tokens"}
    yield _figure(curves(f"{name}-packing", rows, packing, "share of a step's places"), "How full sequences are.")
    imbalance = {"train/token_imbalance": "fullest rank"}
    caption = "Tokens of the data-parallel rank that has most, above the mean of all."
    yield _figure(curves(f"{name}-imbalance", rows, imbalance, "share above the mean"), caption)
    norm = {"train/gradient_norm": "gradient norm"}
    yield _figure(curves(f"{name}-norm", rows, norm, "gradient norm", log=True), "Gradient norm before clipping.")
    rate = {"train/learning_rate": "learning rate"}
    yield _figure(curves(f"{name}-rate", rows, rate, "learning rate"), "Learning-rate schedule.")


def _rl_figures(stage: Stage) -> Iterable[str]:
    name, rows = stage.name, stage.rows
    rewards = {"rollout/reward": "reward", "rollout/accuracy": "accuracy", "rollout/format": "format"}
    caption = "Mean reward of each rollout, and the shares of right and of well-formed answers in it."
    yield _figure(curves(f"{name}-reward", rows, rewards, "mean over a rollout"), caption)
    length = {"rollout/response_length": "response length"}
    yield _figure(curves(f"{name}-length", rows, length, "response length (tokens)"), "Mean length of an answer.")
    kl = {"policy/kl": "KL"}
    caption = "Divergence from the reference policy."
    yield _figure(curves(f"{name}-kl", rows, kl, "KL (nats per token)"), caption)
    entropy = {"policy/entropy": "policy/entropy"}
    yield _figure(curves(f"{name}-entropy", rows, entropy, "entropy (nats per token)"), "Entropy of the policy.")
    times = {"perf/rollout_seconds": "waiting for answers", "perf/train_seconds": "training"}
    yield _figure(time_shares(f"{name}-time", rows, times), "Where the time of a step goes.")
    idle = {"perf/trainer_idle": "trainer", "perf/engine_idle": "engine"}
    caption = (
        "Share of a step's time in which the trainer did not learn, and in which the engine had nothing to answer."
    )
    yield _figure(curves(f"{name}-idle", rows, idle, "idle share"), caption)
    stale = {"rollout/staleness_max": "oldest token", "rollout/staleness_mean": "mean over tokens"}
    caption = "Updates between the weights that sampled a token and those that learn from it."
    yield _figure(curves(f"{name}-stale", rows, stale, "staleness (updates)"), caption)
    clip = {"policy/clip_fraction": "clipped"}
    yield _figure(curves(f"{name}-clip", rows, clip, "clipped share of tokens"), "Tokens whose ratio was held back.")
    norm = {"train/gradient_norm": "gradient norm"}
    yield _figure(curves(f"{name}-norm", rows, norm, "gradient norm", log=True), "Gradient norm before clipping.")
    value = {"critic/loss": "value loss"}
    caption = "What the critic is wrong by: half the mean square over tokens."
    yield _figure(curves(f"{name}-value", rows, value, "value loss", log=True), caption)
    explained = {"critic/explained_variance": "explained"}
    caption = "Share of the returns' variance that the critic knew before it learned from them."
    yield _figure(curves(f"{name}-explained", rows, explained, "explained variance"), caption)
    gap = {"mismatch/logprob_max_abs": "gap"}
    caption = "Difference between the sampler's and the trainer's log-probabilities of the same tokens."
    yield _figure(curves(f"{name}-gap", rows, gap, "log-probability gap (nats)", log=True), caption)


def _settings(stages: Sequence[Stage]) -> str:
    blocks = []
    for stage in stages:
        if stage.config:
            blocks.append(_folded(f"{stage.name}: configuration", f"<pre>{escape(stage.config)}</pre>"))
        if stage.environment:
            pairs = _flat(stage.environment)
            rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in pairs)
            blocks.append(_folded(f"{stage.name}: versions", f"<table>{rows}</table>"))
    return "".join(blocks) or results.missing("No stage has written its configuration.")


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in content.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return pairs


def _files(files: Sequence[tuple[str, int]]) -> str:
    rows = "".join(f"<tr><td>{escape(path)}</td><td>{_size(size)}</td></tr>" for path, size in files)
    if not rows:
        return results.missing("The folder is empty.")
    return _folded(f"{len(files)} entries", f"<table>{rows}</table>")


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
