"""The runs that nothing disturbs, against which disturbed ones are held."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import PRETRAIN, SHORT, Job, undisturbed


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of these tests are, of all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "disturbed-runs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pretrained(root: Path) -> list[dict[str, Any]]:
    """Rows of the short pre-training, the run ``base``, which one worker makes for all."""
    rows = root / "base.json"
    with (root / "base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not rows.exists():
            rows.write_text(json.dumps(undisturbed(Job([*PRETRAIN, *SHORT], root, "base"))))
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found
