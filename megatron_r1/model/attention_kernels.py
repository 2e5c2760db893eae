"""Transformer Engine's kinds of attention kernels, as its own environment variables choose them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.transformer.enums import AttnBackend

from megatron_r1.errors import PlatformError

VARIABLES = {
    "NVTE_FLASH_ATTN": AttnBackend.flash,
    "NVTE_FUSED_ATTN": AttnBackend.fused,
    "NVTE_UNFUSED_ATTN": AttnBackend.unfused,
}


def chosen_attention(environment: Mapping[str, str]) -> AttnBackend:
    """The kind of attention kernels that the environment leaves; all where it says nothing.

    megatron-core sets these variables by its own choice and refuses other values with an assertion, so that its choice
    must follow them.

    Raises:
        PlatformError: two kinds are left, which megatron-core cannot say, or none is.
    """
    left = [kind for name, kind in VARIABLES.items() if environment.get(name, "1") != "0"]
    if len(left) == len(VARIABLES):
        return AttnBackend.auto
    if len(left) == 1:
        return left[0]
    given = ", ".join(f"{name}={environment[name]}" for name in VARIABLES if name in environment)
    raise PlatformError(f"{given}: set two of {', '.join(VARIABLES)} to 0, which leaves one kind of attention, or none")
