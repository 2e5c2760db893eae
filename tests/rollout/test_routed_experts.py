"""Experts travel with a sample, in few bytes, and come back as they were."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest

from megatron_r1.rollout.engine import Completion
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.routed_experts import RoutedExperts, RoutedLayers
from tests.support.samples import make_sample

LAYERS = RoutedLayers(layers=3, first_dense=1, top_k=2)


def experts(tokens: int, most: int = 8) -> np.ndarray:
    return np.random.default_rng(tokens).integers(0, most, (tokens, 2, 2))


def as_sglang(experts_TNK: np.ndarray) -> str:
    """With a dense layer before, as SGLang sends it."""
    whole = np.concatenate([np.zeros_like(experts_TNK[:, :1]), experts_TNK], 1)
    return base64.b64encode(whole.astype("<i4").tobytes()).decode()


@pytest.mark.parametrize(("most", "size"), [(256, 1), (257, 2), (5000, 2)])
def test_numbers_come_back(most, size):
    chosen = experts(11, most)
    chosen[0, 0, 0] = most - 1
    routed = RoutedExperts.of(chosen)
    assert np.array_equal(routed.array(), chosen) and routed.shape == (11, 2, 2)
    assert len(base64.b64decode(routed.data)) == size * chosen.size


def test_sglang_counts_dense_layers_too():
    chosen = experts(5)
    assert np.array_equal(RoutedExperts.from_sglang(as_sglang(chosen), 5, LAYERS).array(), chosen)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (as_sglang(experts(4)), "must be int32"),
        ("!", "base64|Only|padding|non-base64"),
        (as_sglang(experts(5) - 8), "to no expert"),
    ],
)
def test_what_is_not_that_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        RoutedExperts.from_sglang(text, 5, LAYERS)


SAMPLE = make_sample(prompt_tokens=(1, 2), response_tokens=(3, 4))


def test_the_journal_keeps_them(tmp_path):
    samples = [replace(SAMPLE, routed_experts=RoutedExperts.of(experts(3))), SAMPLE]
    journal = Journal(tmp_path)
    journal.write(1, samples)
    assert journal.read(1) == samples


@pytest.mark.parametrize("tokens", [2, 4])
def test_experts_of_other_tokens_are_refused(tokens):
    routed = RoutedExperts.of(experts(tokens))
    with pytest.raises(ValueError, match="must be of the 3 that the model read"):
        replace(SAMPLE, routed_experts=routed)
    with pytest.raises(ValueError, match="must be of the 3 that the model read"):
        Completion("r", (1, 2), (3, 4), (-0.5, -1.0), "stop", "0", routed)
