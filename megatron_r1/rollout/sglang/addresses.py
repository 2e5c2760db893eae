"""Servers that somebody else started: where they are and what opens them."""

from __future__ import annotations

import os

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.rollout.sglang.client import Endpoint

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"
"""Environment variables of the keys: an argument or a configuration file would show them."""


def given(config: SGLangConfig) -> list[Endpoint]:
    """The servers of `rollout.sglang.addresses`."""
    keys = os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, "")
    return [Endpoint(address, *keys) for address in config.addresses]
