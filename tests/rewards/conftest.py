"""What several tests of rewards use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_r1.config.reward import MathConfig
from megatron_r1.rewards.mathematics import MathVerifier


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    """Its workers have time on a busy machine."""
    verifier = MathVerifier(MathConfig(timeout_s=60.0))
    yield verifier
    verifier.close()
