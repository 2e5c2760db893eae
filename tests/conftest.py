"""What every test starts from: one thread, no network, and a deadline (pytest-timeout, in pyproject.toml).

megatron-core keeps process-wide state, so the session has one process group of one rank, made at the first test that
asks for it. A test that runs a whole stage, which makes its own groups, runs it in a process of its own.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.routing import forget_routing

# Set before torch is imported: two cores shared by the threads of several libraries are slower than one used well, and
# sums over one thread have one order. Child processes inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for variable in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, os.environ["OMP_NUM_THREADS"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "agg")

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile's cache does not know of it: code for wider vectors would be found there and not compile.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{capability}")
SUPPORT = Path(__file__).resolve().parent / "support"
LONG_FIRST = ("tests/commands", "tests/dist", "tests/fault", "tests/sglang", "tests/slurm", "tests/transformer_engine")
# Programs that tests start as ranks import `tests.support` too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start ranks, servers and whole runs come first, so that no worker ends minutes after the other."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FIRST))


@pytest.fixture(autouse=True)
def routing_forgotten() -> Iterator[None]:
    """Each test's models have their own depth and shape."""
    yield
    forget_routing()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Any]:
    """The platform, inside the session's process groups of one rank."""
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.platform import select

    platform = select("cpu")
    from megatron_r1.parallel.mesh import process_groups

    with process_groups(
        platform, ParallelConfig(), seed=0, threads=int(os.environ["OMP_NUM_THREADS"]), timeout_minutes=45
    ):
        yield platform


@pytest.fixture(scope="session")
def new_model(one_rank: Any) -> Callable[..., Any]:
    """Builds a model: new_model(ModelConfig, seed=0). A test that changes weights builds its own."""
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.model.build import build_model

    def build(model: Any, seed: int = 0) -> Any:
        return build_model(model, ParallelConfig(), one_rank, seed)

    return build


@pytest.fixture(scope="session")
def tiny(new_model: Callable[..., Any]) -> Any:
    """The tiny model, its weights large enough for probabilities to differ. For reading only."""
    from tests.support.layouts import model_of

    return new_model(model_of("tiny"))


@pytest.fixture(scope="session")
def two_ranks(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What support/two_ranks.py found, by rank; started once for all the tests that read it."""
    import torch
    from safetensors.torch import save_file

    from megatron_r1.model.build import native_tensors
    from tests.support.fork_server import run_forked_to_the_end

    folder = tmp_path_factory.mktemp("two-ranks")
    save_file({name: tensor.contiguous() for name, tensor in native_tensors(tiny)}, folder / "whole.safetensors")
    rows = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))
    save_file({"rows": rows}, folder / "rows.safetensors")
    run_forked_to_the_end(SUPPORT / "two_ranks.py", folder, ranks=2)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
