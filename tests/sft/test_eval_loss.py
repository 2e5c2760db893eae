"""What is recorded of the loss on validation examples."""

from __future__ import annotations

import math

import pytest

from megatron_r1.sft.eval_loss import loss_and_perplexity


def test_perplexity_stands_beside_the_loss():
    assert [*loss_and_perplexity(2.0).values()] == pytest.approx([2.0, 7.389056098930650])
    assert [*loss_and_perplexity(1000.0).values()] == [1000.0, math.inf]
