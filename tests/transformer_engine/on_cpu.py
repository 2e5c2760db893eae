"""How tests run this project on Transformer Engine without a GPU.

A process takes either Transformer Engine or torch's parts, for good, and pytest's own has torch's. So a program for
ranks, or a verb, is started as an argument of this package, and needs no change:

    python -m tests.transformer_engine [--ranks 2] tests/some/program.py FOLDER ...
    python -m tests.transformer_engine megatron_r1 pretrain model=tiny ...          # a module, as with python -m
    run_with_transformer_engine(program, folder, ranks=2, seconds=60)               # the same from a test
    run_forked_to_the_end(program, folder, seconds=60)                              # torch's parts, to compare with

A test's programs, and the ranks of each, are forked from one process that has imported everything, which is most of
what they cost; a program that computes in several layouts calls `meet_elsewhere()` inside each one's process groups.
Inside, `select("cpu")` gives Platform("cpu", "gloo", transformer_engine=True): the real modules, autograd functions and
FusedAdam, over kernels in torch (kernels.py). One that is not there yet raises NotImplementedError with its name: add
it there.
A test that needs this is marked `@needs_transformer_engine`, which skips where launch/test.sh did not install `.te`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.fork_server import ForkServer, import_verbs, must_succeed, run_on_ranks, serve

FOLDER = Path(sys.prefix).resolve().parent / ".te"
"""Where launch/test.sh installs Transformer Engine: beside the environment, in which nothing could then be imported."""
CAPABILITY = (9, 0)
"""Of the GPU that Transformer Engine is to find: Hopper."""

needs_transformer_engine = pytest.mark.skipif(
    not (FOLDER / "transformer_engine").is_dir(), reason=f"needs Transformer Engine in {FOLDER}: launch/test.sh"
)


def run_with_transformer_engine(program: str | Path, *arguments: object, ranks: int = 1, seconds: float = 100) -> None:
    """Run a program, or a module by its name, to its end on so many ranks; it must succeed."""
    must_succeed(_server().run("--ranks", ranks, program, *arguments, seconds=seconds))


@functools.cache
def _server() -> ForkServer:
    return ForkServer("tests.transformer_engine", "--serve")


def use_transformer_engine() -> None:
    """Make this process one of Transformer Engine on a CPU; must come before it imports megatron.core."""
    import torch

    sys.path.append(str(FOLDER))
    if importlib.util.find_spec("transformer_engine") is None:
        raise ModuleNotFoundError(f"no Transformer Engine in {FOLDER}")
    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda _: True)
    from megatron_r1 import platform

    platform.cpu_platform()
    del sys.modules["transformer_engine"]  # which a CPU's platform hides
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)  # there is one generator
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.cuda.get_device_properties = _properties
    from tests.transformer_engine.extension import install

    install()
    platform.PLATFORMS["cpu"] = lambda: platform.Platform("cpu", "gloo", transformer_engine=True)


def _properties(*_: object) -> types.SimpleNamespace:
    """Of a GPU, by which Transformer Engine measures its workspaces."""
    return types.SimpleNamespace(
        major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=1, name="CPU", total_memory=2**30
    )


def main(arguments: Sequence[str]) -> int:
    """Run a program as `python` would, on one rank or several; or, with --serve, each that a test asks for."""
    use_transformer_engine()
    import_verbs()
    if arguments != ["--serve"]:
        return run_on_ranks([*arguments])
    serve(run_on_ranks)
    return 0
