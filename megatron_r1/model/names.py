"""What the name of a parameter says; without megatron-core, which programs that only read tensors do not import."""

from __future__ import annotations


def in_multi_token_layer(name: str) -> bool:
    """Whether a parameter, named as its rank's model names it, belongs to a multi-token prediction layer."""
    return "mtp" in name.split(".")


def in_router(name: str) -> bool:
    """Whether a parameter belongs to a router of experts."""
    return "router" in name.split(".")
