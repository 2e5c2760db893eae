"""What tests on GPUs share.

MEGATRON_R1_REHEARSE=cpu runs those that can on a CPU, where their bounds still hold but show nothing of a GPU: so
their programs stay right while nobody has one. `tools/bench/gpu_first_hour.py` runs all in a useful order.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.keys import only_read
from tests.support.launching import run_to_the_end

REHEARSAL = os.environ.get("MEGATRON_R1_REHEARSE") == "cpu"
PLATFORM = "cpu" if REHEARSAL else "cuda"
GPUS = 8 if REHEARSAL else torch.cuda.device_count()
PROGRAMS = Path(__file__).resolve().parents[1] / "gpu" / "programs"
TINY = (f"platform={PLATFORM}", "track=off", "data.num_documents=2000", "train.schedule.warmup_steps=2")


def needs_gpus(count: int = 1) -> list[pytest.MarkDecorator]:
    """Marks of tests that use so many GPUs of this machine."""
    return [pytest.mark.gpu, pytest.mark.skipif(count > GPUS, reason=f"needs {count} NVIDIA GPU{'s'[: count - 1]}")]


needs_real_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def run_verb(verb: str, *arguments: str, ranks: int = 1, seconds: float = 600) -> None:
    """Run a verb to its end; settings of `TINY` that it does not read are left out."""
    settings = [*only_read(verb, [*TINY]), *arguments]
    run_to_the_end([*launcher(ranks), "-m", "megatron_r1", verb, *settings], seconds)


def run_program(name: str, *arguments: object, ranks: int = 1, seconds: float = 600) -> None:
    """Run one of tests/gpu/programs to its end."""
    run_to_the_end([*launcher(ranks), str(PROGRAMS / name), PLATFORM, *map(str, arguments)], seconds)


def launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics, by step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Training loss of each step."""
    return [row["train/loss"] for row in metrics(folder) if "train/loss" in row]
