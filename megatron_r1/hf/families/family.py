"""What a family of Hugging Face models is, and the keys of config.json that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from megatron_r1.config.model import ModelConfig, RopeConfig
from megatron_r1.hf.param_mapping import ParamMapping


class Family(ABC):
    """Names and config.json of one kind of model."""

    model_type: str
    """As in config.json."""
    architecture: str
    """Name of transformers' class."""
    fixed: ClassVar[dict[str, Any]]
    """Keys of config.json that may be absent and otherwise must have this value."""

    @abstractmethod
    def has(self, model: ModelConfig) -> bool:
        """Whether the model's shape is one of this family's."""

    @abstractmethod
    def check(self, model: ModelConfig) -> None:
        """Refuse what code of this family elsewhere would load and then compute differently.

        Raises:
            ConfigError: names the field.
        """

    @abstractmethod
    def mappings(self, model: ModelConfig, include_mtp: bool) -> list[ParamMapping]:
        """The table of names, in Hugging Face's layer order."""

    @abstractmethod
    def config(self, model: ModelConfig, include_mtp: bool) -> dict[str, Any]:
        """The keys of config.json that not every family has."""

    @abstractmethod
    def sections(self, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of ModelConfig that not every family has, from a config.json.

        Raises:
            KeyError: a key is missing.
            ValueError: a key says what this project's model does not have.
        """


def written_rope(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling` as the releases write it; None for plain rotary positions."""
    if rope.factor == 1:
        return None
    if rope.scaling == "llama3":
        return {
            "factor": rope.factor,
            "high_freq_factor": rope.beta_fast,
            "low_freq_factor": rope.beta_slow,
            "original_max_position_embeddings": rope.original_max_position,
            "rope_type": "llama3",
        }
    return written_yarn(rope)


def written_yarn(rope: RopeConfig) -> dict[str, Any]:
    """`rope_scaling` of DeepSeek's releases, whatever the factor."""
    return {
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "factor": rope.factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "original_max_position_embeddings": rope.original_max_position,
        "type": "yarn",
    }


_ANY_ROPE = {"rope_type", "type", "rope_theta"}
_EXTENDED = {"factor", "original_max_position_embeddings"}
_ROPE_KEYS = {
    "default": _ANY_ROPE,
    "yarn": _ANY_ROPE | _EXTENDED | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "llama3": _ANY_ROPE | _EXTENDED | {"high_freq_factor", "low_freq_factor"},
}
"""Kind of rotary positions -> keys of its settings."""
_PLAIN = {"partial_rotary_factor": 1.0, "truncate": True}
"""Further keys, with the value that changes nothing."""


def read_rope(config: dict[str, Any]) -> RopeConfig:
    """The release's `rope_theta` with `rope_scaling`, or the `rope_parameters` of newer transformers.

    Raises:
        ValueError: a kind of scaling, or a setting of one, that this project's model does not have.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = {key: value for key, value in given.items() if value is not None}
    base = scaling.get("rope_theta") or config["rope_theta"]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope_scaling type {kind}: must be yarn, llama3 or absent")
    for key, value in scaling.items():
        if key not in _ROPE_KEYS[kind] and _PLAIN.get(key) != value:
            raise ValueError(f"rope_scaling.{key}={value}: must be absent with the type {kind}")
    if kind == "default":
        return RopeConfig(base=base)
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        fast, slow = scaling["high_freq_factor"], scaling["low_freq_factor"]
        settings = {"factor": scaling["factor"], "beta_fast": fast, "beta_slow": slow}
    else:
        # What a release leaves out, DeepSeek's code takes as: 1 for the rotary part, 0 for the whole logit.
        settings = {"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
        settings |= {name: scaling[name] for name in (*settings, "beta_fast", "beta_slow") if name in scaling}
    return RopeConfig(base=base, scaling=kind, original_max_position=original, **settings)
