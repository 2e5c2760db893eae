"""Experts travel with a sample, in few bytes, and come back as they were."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.routed_experts import RoutedLayers, narrowed, parse_routed_experts
from tests.support.samples import make_response, make_sample

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
    routed = narrowed(chosen)
    assert np.array_equal(routed, chosen) and routed.nbytes == size * chosen.size


def test_sglang_counts_dense_layers_too():
    chosen = experts(5)
    assert np.array_equal(parse_routed_experts(as_sglang(chosen), 5, LAYERS), chosen)


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
        parse_routed_experts(text, 5, LAYERS)


def test_the_journal_keeps_them(tmp_path):
    """Of some responses none, of others numbers that need more bytes."""
    kinds = [None, narrowed(experts(3)), narrowed(experts(3, 5000)), None]
    samples = [make_sample(prompt_tokens=(1, 2), response_tokens=(3, 4), routed_experts=kind) for kind in kinds]
    journal = Journal(tmp_path)
    journal.write(1, samples)
    assert journal.read(1) == samples


@pytest.mark.parametrize("tokens", [2, 4])
def test_experts_of_other_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="must be of the 3 that the model read"):
        make_response((1, 2), (3, 4), (-0.5, -1.0), narrowed(experts(tokens)))
