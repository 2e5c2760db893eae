"""The model of a run that starts from weights: theirs, but for the keys that may differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.schema import exists, resolved, shown
from megatron_r1.errors import ConfigError

TRAINING = ("mtp.loss_coefficient", "moe.bias_update_rate", "moe.sequence_loss_coefficient")
"""Keys that affect how a model is trained, not what it computes: weights do not determine them."""
MAY_DIFFER = ("dtype", "max_sequence_length", "rope", "init_std", *TRAINING)
"""Keys and sections that a run may set otherwise than its initial weights have them: none of them has weights.

Multi-token layers may be left out too: `model.mtp.num_layers` may be 0.
"""

_WITHOUT_MTP = ("mtp.num_layers", 0)


def model_of_weights(
    composed: Mapping[str, Any],
    found: ModelConfig,
    overrides: Mapping[str, str],
    source: str,
    may_differ: Sequence[str] = MAY_DIFFER,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The `model` section of a run that starts from weights, and where each key's value is from.

    Args:
        composed: the section as its group, recipe and command line give it.
        found: model of the weights.
        overrides: key within the section -> who sets it: the recipe or the command line.
        source: value of `init.from`, for errors.
        may_differ: keys and sections that overrides may change.

    Raises:
        ConfigError: an override must have the weights' value and has another, or is of another kind of model.
    """
    tree = resolved(found)
    origins = {f"model.{key}": f"init.from={source}" for key in _leaves(tree)}
    for key in TRAINING:
        _put(tree, key, _get(composed, key))
        origins[f"model.{key}"] = "model group"
    for key, origin in overrides.items():
        value, theirs = _get(composed, key), _get(tree, key)
        if theirs is None and exists(f"model.{key}"):
            raise ConfigError(f"model.{key}", shown(value), f"the model of {source} has no such key")
        allowed = theirs in (None, value) or (key, value) == _WITHOUT_MTP or _is_within(key, may_differ)
        if not allowed:
            raise ConfigError(f"model.{key}", shown(value), _must_be(theirs, source, may_differ))
        _put(tree, key, value)
        origins[f"model.{key}"] = origin
    return tree, origins


def without_unused_layers(found: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The model of the weights without its multi-token layers, where the run's has none."""
    return found if model.mtp.num_layers else replace(found, mtp=replace(found.mtp, num_layers=0))


def check_same_model(model: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse weights of another shape, naming the first field that differs.

    Positions have no weights: a run may have a shorter context than the model it starts from, or extend its rotary
    positions.

    Args:
        model: of the run.
        found: of the weights.
        source: where the weights are from.

    Raises:
        ConfigError: a shape differs, or rotary positions are extended in another way than in the weights' training.
    """
    dense = not (model.moe.num_experts or found.moe.num_experts)
    for name, (mine, theirs) in _differences(model, found):
        if dense and name.startswith("moe."):
            continue  # has no effect without experts, and the config.json of a dense model does not have it
        if not _is_within(name, MAY_DIFFER):
            raise ConfigError(f"model.{name}", mine, _must_be(theirs, source))
    _check_positions(model, found, source)


def _must_be(theirs: object, source: str, may_differ: Sequence[str] = MAY_DIFFER) -> str:
    others = f"; only {', '.join(may_differ)} may differ" if may_differ else ""
    return f"must be {shown(theirs)}, as in {source}{others}"


def _is_within(key: str, sections: Sequence[str]) -> bool:
    return key in sections or key.startswith(tuple(f"{name}." for name in sections))


def _check_positions(model: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse rotary positions that neither are those of the weights nor extend them."""
    rope, before = model.rope, found.rope
    if rope.factor < before.factor:
        raise ConfigError("model.rope.factor", rope.factor, f"must be at least {before.factor}, as in {source}")
    # Without an extension only the base has an effect; with one, all other settings but the factor are fixed.
    names = ["base"] if before.factor == 1 else [field.name for field in fields(before) if field.name != "factor"]
    for name in names:
        mine, theirs = getattr(rope, name), getattr(before, name)
        if mine != theirs:
            raise ConfigError(f"model.rope.{name}", mine, f"must be {theirs}, as in {source}")
    reach = max(found.max_sequence_length, int(rope.original_max_position * rope.factor))
    if model.max_sequence_length > reach:
        allowed = f"must be at most {reach}: model.rope.factor extends {source} no further"
        raise ConfigError("model.max_sequence_length", model.max_sequence_length, allowed)


def _differences(model: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Fields with different values: name, and both values."""
    if type(model) is not type(found):
        yield f"{prefix}kind", (model.kind, found.kind)
        return
    for field in fields(model):
        mine, theirs = getattr(model, field.name), getattr(found, field.name)
        if is_dataclass(mine):
            yield from _differences(mine, theirs, f"{prefix}{field.name}.")
        elif mine != theirs:
            yield f"{prefix}{field.name}", (mine, theirs)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _get(tree: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return deepcopy(tree)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, with the sections on its way."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value
