"""Where metrics go besides the run directory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import one_of


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    """wandb."""

    wandb: str = "auto"
    """auto (online with a key, else offline), online, offline or disabled."""
    project: str = "megatron_r1"
    """wandb project."""

    def __post_init__(self) -> None:
        one_of(self, "wandb", ("auto", "online", "offline", "disabled"))
