"""Log-probabilities and their gradient against log_softmax in float64, over one rank and over two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_r1.parallel.mesh import tensor_parallel_group
from megatron_r1.rl.logprob import token_log_probs


def expected(logits_BLV: Tensor, targets_BL: Tensor, weights_BL: Tensor, temperature: float):
    """Log-probabilities, entropy and the gradient of their weighted sum, in float64."""
    logits_BLV = logits_BLV.double().requires_grad_()
    log_probs_BLV = (logits_BLV / temperature).log_softmax(-1)
    chosen_BL = log_probs_BLV.gather(-1, targets_BL[..., None])[..., 0]
    (chosen_BL * weights_BL.double()).sum().backward()
    entropy_BL = -(log_probs_BLV.exp() * log_probs_BLV).sum(-1)
    return chosen_BL.detach(), entropy_BL.detach(), logits_BLV.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_one_rank_equals_log_softmax(one_rank, temperature, scale):
    generator = torch.Generator().manual_seed(0)
    logits_BLV = torch.randn(4, 9, 50, generator=generator) * scale
    targets_BL = torch.randint(0, 50, (4, 9), generator=generator)
    weights_BL = torch.randn(4, 9, generator=generator)
    mine_BLV = logits_BLV.clone().requires_grad_()
    log_probs_BL, entropy_BL = token_log_probs(mine_BLV, targets_BL, temperature, tensor_parallel_group())
    (log_probs_BL * weights_BL).sum().backward()
    wanted = expected(logits_BLV, targets_BL, weights_BL, temperature)
    for found, exact in zip((log_probs_BL, entropy_BL, mine_BLV.grad), wanted, strict=True):
        torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=2e-6 * scale)
    assert not entropy_BL.requires_grad and log_probs_BL.dtype == torch.float32


def test_half_precision_logits_are_computed_in_full_precision(one_rank):
    logits_BLV = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets_BL = torch.tensor([[0, 29]])
    found, _ = token_log_probs(logits_BLV, targets_BL, 1.0, tensor_parallel_group())
    exact, _, _ = expected(logits_BLV, targets_BL, torch.ones(1, 2), 1.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_two_ranks_that_share_the_vocabulary_equal_one(two_ranks):
    given = {name: torch.tensor(two_ranks[0]["log_probs"][name]) for name in ("logits", "targets", "weights")}
    log_probs_BL, entropy_BL, gradient_BLV = expected(given["logits"], given["targets"], given["weights"], 0.7)
    for rank, found in enumerate(two_ranks):
        found = {name: torch.tensor(value, dtype=torch.float64) for name, value in found["log_probs"].items()}
        torch.testing.assert_close(found["log_probs"], log_probs_BL, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["entropy"], entropy_BL, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["gradient"], gradient_BLV.chunk(2, -1)[rank], rtol=1e-5, atol=1e-6)
