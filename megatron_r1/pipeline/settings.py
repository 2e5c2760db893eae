"""The main settings of a stage for the recipe's table, read from its composed configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_r1.pipeline.compose import ComposedStage

Settings = Mapping[str, Any]
POST_TRAINING = ("sft", "reward_model", "dpo", "grpo")


def settings_of(stage: ComposedStage) -> dict[str, str]:
    """Column -> what the table says; columns that a verb has no value for are empty."""
    return {column: str(value(stage, stage.settings)) for column, value in COLUMNS.items()}


def _starts_from(stage: ComposedStage, settings: Settings) -> str:
    named = _stages_at(stage, settings, "init.from", "evaluate.models.", "average.models.")
    return named or ("random" if stage.verb in ("pretrain", *POST_TRAINING) else "")


def _stages_at(stage: ComposedStage, settings: Settings, *prefixes: str) -> str:
    """What keys with these beginnings name: a stage by its name, everything else by its path."""
    names = {path: stage.inputs[key].stage for key, path in stage.paths.items()}
    paths = [str(value) for key, value in settings.items() if key.startswith(prefixes) and value]
    return ", ".join(names.get(path, path) for path in paths)


def _data(stage: ComposedStage, settings: Settings) -> str:
    """Where the data is from, and how much of it."""
    others = [f"{output.stage}.{output.type}" for output in stage.inputs.values() if output.type not in MODELS]
    size = DATA[stage.verb](settings) if stage.verb in DATA else ""
    return "; ".join(dict.fromkeys(part for part in (*others, size) if part))


def _pretraining_data(settings: Settings) -> str:
    source = settings["data.source"]
    if source == "indexed":
        names = dict.fromkeys(key.split(".")[3] for key in settings if key.startswith("data.indexed.datasets."))
        return f"datasets {', '.join(names)}"
    return f"{source}, {settings['data.num_documents']} documents"


def _conversations(settings: Settings) -> str:
    if settings["sft.source"] == "files":
        return "files"
    return f"{settings['sft.source']}, {settings['sft.num_conversations']} conversations"


def _prompts(settings: Settings) -> str:
    source = "file" if settings["data.prompts.path"] else settings["data.source"]
    return f"{source}, {settings['rl.prompts_per_rollout']} x {settings['rl.group_size']} a step"


def _examples(section: str, key: str, noun: str) -> Callable[[Settings], str]:
    def text(settings: Settings) -> str:
        source = settings[f"{section}.source"]
        return "file" if source == "file" else f"{source}, {settings[f'{section}.{key}']} {noun}"

    return text


def _curated(settings: Settings) -> str:
    quotas = {key.removeprefix("curate.quotas."): rows for key, rows in settings.items() if "curate.quotas." in key}
    return ", ".join(f"{rows} {domain}" for domain, rows in quotas.items())


MODELS = ("checkpoint", "hf", "reward_model")
"""Types of output that are models, not data."""
DATA: dict[str, Callable[[Settings], str]] = {
    "pretrain": _pretraining_data,
    "sft": _conversations,
    "grpo": _prompts,
    "reward_model": _examples("reward_model", "num_examples", "examples"),
    "dpo": _examples("dpo", "num_pairs", "pairs"),
    "sample": lambda s: f"{s['sample.max_prompts'] or 'all'} prompts x {s['sample.samples_per_prompt']}",
    "curate": _curated,
    "evaluate": lambda s: f"{s['evaluate.benchmark']}, {s['evaluate.num_prompts']} prompts",
}


def _router_policy(stage: ComposedStage, settings: Settings) -> str:
    if not settings.get("model.moe.num_experts"):
        return ""
    section = "model.moe" if stage.verb == "pretrain" else "routing"
    rate, loss = (settings.get(f"{section}.{key}") for key in ("bias_update_rate", "sequence_loss_coefficient"))
    if rate is None:
        return ""
    balancing = f"bias {rate:g}, sequence loss {loss:g}" if rate or loss else "no balancing"
    return f"{'trained' if settings.get('routing.train_weights', True) else 'frozen'}, {balancing}"


def _mtp(stage: ComposedStage, settings: Settings) -> str:
    layers = settings.get("model.mtp.num_layers")
    if layers is None or stage.verb not in ("pretrain", *POST_TRAINING):
        return ""
    weight = settings.get("model.mtp.loss_coefficient")  # only of verbs that train these layers
    return "none" if not layers else f"{layers}, weight {weight:g}" if weight else f"{layers}, not trained"


def _reference_reset(_: ComposedStage, settings: Settings) -> str:
    interval = settings.get("rl.reference_sync_interval")
    return "" if interval is None else f"every {interval} steps" if interval else "never"


def _steps(stage: ComposedStage, settings: Settings) -> str:
    epochs = next((settings[key] for key in (f"{stage.verb}.epochs",) if key in settings), None)
    steps = settings.get("train.steps", "")
    return f"{steps or ''}" if epochs is None else f"{epochs} epochs" + (f", at most {steps}" if steps else "")


def _learning_rate(_: ComposedStage, settings: Settings) -> str:
    peak = settings.get("train.schedule.learning_rate")
    if peak is None:
        return ""
    style, low = settings["train.schedule.lr_decay_style"], settings["train.schedule.min_learning_rate"]
    return f"{peak:g}, {style}" if style == "constant" else f"{peak:g} -> {low:g}, {style}"


def _clip(_: ComposedStage, settings: Settings) -> str:
    low, high = settings.get("rl.clip_epsilon"), settings.get("rl.clip_epsilon_high")
    return "" if low is None else f"{low:g} / {high:g}" if high else f"{low:g}"


def _temperature(stage: ComposedStage, settings: Settings) -> str:
    key = "evaluate.temperature" if stage.verb == "evaluate" else "rollout.temperature"
    return f"{settings[key]:g}" if key in settings and stage.verb != "dpo" else ""


def _rewards(stage: ComposedStage, settings: Settings) -> str:
    if stage.verb != "grpo":
        return ""
    weights = {key.removeprefix("reward."): value for key, value in settings.items() if key.count(".") == 1}
    return ", ".join(f"{name} {weights[name]:g}" for name in REWARDS if weights.get(name))


REWARDS = (
    "accuracy", "format", "language", "overlong", "repetition", "helpfulness", "harmlessness", "judge", "custom",
    "steps",
)  # fmt: skip
"""Keys of `reward` that are weights."""
COLUMNS: dict[str, Callable[[ComposedStage, Settings], str]] = {
    "verb": lambda stage, _: stage.verb,
    "starts from": _starts_from,
    "teacher": lambda stage, settings: _stages_at(stage, settings, "sft.teacher.from", "rl.teacher.from"),
    "data": _data,
    "router policy": _router_policy,
    "multi-token prediction": _mtp,
    "reference reset": _reference_reset,
    "steps": _steps,
    "learning rate": _learning_rate,
    "clip": _clip,
    "temperature": _temperature,
    "rewards": _rewards,
}
