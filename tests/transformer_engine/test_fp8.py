"""FP8 and FusedAdam on Transformer Engine: their cases, in one process of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transformer_engine.on_cpu import needs_transformer_engine, run_with_transformer_engine

pytestmark = needs_transformer_engine
HERE = Path(__file__).parent
SHARED = ["test_ema.py", "test_offload.py", "test_step.py::test_a_gradient_that_is_not_finite_changes_nothing"]
"""Of tests/train, for they hold here too: the moving average, memory that is offloaded, updates that are skipped."""


@pytest.mark.timeout(320)
def test_fp8_and_fused_adam() -> None:
    files = [HERE / "cases_fp8.py", HERE / "cases_optimizer.py", *(HERE.parent / "train" / name for name in SHARED)]
    run_with_transformer_engine("pytest", *files, "-q", "-p", "no:cacheprovider", "-k", "not gather_what", seconds=300)
