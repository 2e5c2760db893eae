"""The command line in forks of one process that has imported what it needs before a verb's own code: no torch.

    run_light("pretrain", "x=1")           # what `megatron-r1 pretrain x=1` does

A command that imports torch or another of HEAVY says so on stderr.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib import import_module

from megatron_r1.config.load import load
from tests.support.fork_server import ForkServer, serve

HEAVY = ("torch", "megatron", "transformers", "sglang", "wandb", "numpy")
LIGHT = ("megatron_r1.config.describe", "megatron_r1.runs.source")
"""Imported before the forks."""


@cache
def _of_commands() -> ForkServer:
    return ForkServer("tests.support.light_forks")


def run_light(*arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command that ends before a verb's own code does, such as one that is refused, to its end."""
    return _of_commands().run(*arguments, seconds=seconds)


def heavy_modules() -> list[str]:
    """Those of HEAVY that this process has imported."""
    return [name for name in HEAVY if name in sys.modules]


def _command(arguments: list[str]) -> None:
    from megatron_r1.__main__ import main

    sys.argv = ["megatron-r1", *arguments]
    try:
        main()
    finally:
        if heavy := heavy_modules():
            print(f"imported {heavy}", file=sys.stderr)


if __name__ == "__main__":
    for name in LIGHT:
        import_module(name)
    for verb in ("pretrain", "grpo"):
        load(verb, [])  # what most commands compose, which is remembered
    assert not heavy_modules(), f"imported before a command: {heavy_modules()}"
    serve(_command)
