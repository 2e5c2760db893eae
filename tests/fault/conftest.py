"""The runs that nothing disturbs, against which disturbed ones are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import PRETRAIN, SHORT, Job, undisturbed


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of these tests are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def pretrained(root: Path) -> tuple[list[dict[str, Any]], float]:
    """Rows of the short pre-training, the run ``base``, and how many seconds its ranks lived."""
    return undisturbed(Job([*PRETRAIN, *SHORT], root, "base"))
