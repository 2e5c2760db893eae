"""Servers that somebody else started: where they are and what opens them."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers import slurm
from megatron_r1.rollout.sglang.servers.address_file import read_addresses

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"
"""Environment variables of the keys: an argument or a configuration file would show them."""


def given(config: SGLangConfig) -> list[Endpoint]:
    """The servers of `rollout.sglang.addresses`, of `address_file` or of `slurm`; the last two are waited for.

    Raises:
        ConfigError: a line of the file is no address, or this SLURM job has no such nodes.
        NoRolloutCapacity: the file does not name all servers in time, or one on the job's nodes does not answer.
    """
    keys = os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, "")
    urls = config.addresses
    if config.address_file:
        urls = read_addresses(Path(config.address_file), config.servers, config.start_timeout_s)
    if config.slurm.nodes != "none":
        urls = slurm.addresses(config.slurm, os.environ)
        slurm.wait_for(urls, config.start_timeout_s)
    return [Endpoint(url, *keys) for url in urls]
