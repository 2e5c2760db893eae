"""Scores in chunks against float64 over the whole vocabulary, with the head on one rank or several; their memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_r1.model.lm_head import Head
from megatron_r1.model.vocab_parallel import ReferenceHidden, score_tokens
from megatron_r1.model.vocab_parallel_topk import topk_logprobs
from megatron_r1.parallel.mesh import tensor_parallel_group
from tests.support.launching import run_to_the_end
from tests.support.live_bytes import LiveBytes

SCRIPT = Path(__file__).parents[1] / "support/ranks_vocabulary.py"
CLOSE = {"float32": 1e-6, "float64": 1e-13}


def drawn(tokens: int, width: int, rows: int, seed: int = 0, kind: torch.dtype = torch.float32):
    """Hidden states, head and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD, weight_VD = (torch.randn(count, width, generator=generator) for count in (tokens, rows))
    targets_T = torch.randint(0, rows, (tokens,), generator=generator)
    return hidden_TD.to(kind).requires_grad_(), (weight_VD / width**0.5).to(kind).requires_grad_(), targets_T


@pytest.mark.dist
def test_heads_shared_out_equal_the_whole_vocabulary_in_float64(tmp_path):
    run_to_the_end([sys.executable, str(SCRIPT), str(tmp_path)], seconds=110)
    for rank in range(4):
        of = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for what, cases, quantities in (("scores", 36, 5), ("top words", 72, 2)):
            found = of[what]
            assert len(found) == cases
            for case, differences in found.items():
                assert len(differences) == quantities and differences.pop("ids", 0) == 0, (rank, case)
                assert max(differences.values()) < CLOSE[case.rpartition(" ")[2]], (rank, case, differences)
            largest = {kind: max(max(d.values()) for case, d in found.items() if case.endswith(kind)) for kind in CLOSE}
            print(f"{what}: largest relative difference to float64 {largest}")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_large_logits_stay_finite_and_right(one_rank, temperature, scale):
    hidden_TD, weight_VD, targets_T = drawn(30, 8, 50)
    scores = score_tokens(
        hidden_TD * scale, targets_T, Head(weight_VD, tensor_parallel_group()), temperature=temperature
    )
    exact_TV = (hidden_TD.detach() * scale).double() @ weight_VD.detach().double().t() / temperature
    exact_TV = exact_TV.log_softmax(-1)
    entropy_T = -(exact_TV.exp() * exact_TV).sum(-1)
    tolerance = {"rtol": 1e-5, "atol": 2e-6 * scale}
    chosen_T = exact_TV.gather(-1, targets_T[:, None])[:, 0]
    torch.testing.assert_close(scores.log_probs.detach().double(), chosen_T, **tolerance)
    torch.testing.assert_close(scores.entropy.detach().double(), entropy_T, **tolerance)
    (scores.log_probs.sum() + scores.entropy.sum()).backward()
    assert hidden_TD.grad.isfinite().all() and weight_VD.grad.isfinite().all() and scores.divergence is None


def test_the_divergence_to_a_near_model_keeps_its_digits(one_rank):
    hidden_TD, weight_VD, targets_T = drawn(40, 32, 500)
    other = ReferenceHidden(hidden_TD.detach() + 1e-4 * drawn(40, 32, 1, seed=1)[0].detach(), weight_VD.detach())
    found = score_tokens(hidden_TD, targets_T, Head(weight_VD, tensor_parallel_group()), reference=other).divergence
    exact = score_tokens(
        hidden_TD.double(),
        targets_T,
        Head(weight_VD.double(), tensor_parallel_group()),
        reference=ReferenceHidden(other.hidden_TD.double(), other.weight_VD.double()),
    ).divergence
    assert ((exact > 0) & (exact < 1e-7)).all()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-8)
    same = score_tokens(
        hidden_TD, targets_T, Head(weight_VD, tensor_parallel_group()), reference=ReferenceHidden(hidden_TD, weight_VD)
    )
    same.divergence.sum().backward()
    assert not same.divergence.any() and not hidden_TD.grad.any()


def test_half_precision_is_scored_in_full_and_its_gradient_summed_in_full(one_rank):
    hidden_TD, weight_VD, targets_T = drawn(256, 16, 64, kind=torch.bfloat16)
    scores = score_tokens(hidden_TD, targets_T, Head(weight_VD, tensor_parallel_group()), chunk_logits=64)
    logits_TV = (hidden_TD.detach() @ weight_VD.detach().t()).double().requires_grad_()
    log_probs_TV = logits_TV.log_softmax(-1)
    log_probs_TV.gather(-1, targets_T[:, None]).sum().backward()
    chosen_T = log_probs_TV.detach().gather(-1, targets_T[:, None])[:, 0]
    torch.testing.assert_close(scores.log_probs.detach().double(), chosen_T, rtol=1e-6, atol=1e-6)
    scores.log_probs.sum().backward()
    exact_VD = logits_TV.grad.t() @ hidden_TD.detach().double()
    # 256 chunks of one token: bf16 sums would be further off than the last bit of the result.
    assert float((weight_VD.grad.double() - exact_VD).norm() / exact_VD.norm()) < 4e-3
    assert scores.log_probs.dtype == torch.float32 and weight_VD.grad.dtype == torch.bfloat16


def test_chunks_change_no_value_that_matters_and_no_tokens_are_fine(one_rank):
    results = []
    for chunk_logits in (1, 50 * 7, 50 * 1000):
        hidden_TD, weight_VD, targets_T = drawn(30, 8, 50, kind=torch.float64)
        scores = score_tokens(hidden_TD, targets_T, Head(weight_VD, tensor_parallel_group()), chunk_logits=chunk_logits)
        (scores.log_probs * scores.entropy).sum().backward()
        results.append((scores.log_probs, scores.entropy, hidden_TD.grad, weight_VD.grad))
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[1], results[2], rtol=1e-12, atol=1e-14)
    hidden_TD, weight_VD, targets_T = drawn(0, 8, 50)
    scores = score_tokens(hidden_TD, targets_T, Head(weight_VD, tensor_parallel_group()))
    scores.log_probs.sum().backward()
    assert scores.entropy.shape == (0,) and not weight_VD.grad.any()


def test_memory_is_a_few_chunks_beside_the_gradients(one_rank):
    tokens, width, rows = 512, 32, 4096
    hidden_TD, weight_VD, targets_T = drawn(tokens, width, rows)
    gradients = hidden_TD.nbytes + weight_VD.nbytes
    most = {}
    for name, chunk_logits in (("chunked", tokens * rows // 32), ("whole", tokens * rows)):
        hidden_TD.grad = weight_VD.grad = None
        with LiveBytes([hidden_TD, weight_VD, targets_T]) as live:
            scores = score_tokens(
                hidden_TD, targets_T, Head(weight_VD, tensor_parallel_group()), chunk_logits=chunk_logits
            )
            (scores.log_probs.sum() - 0.1 * scores.entropy.sum()).backward()
        most[name] = live.most - gradients
    logits = tokens * rows * 4
    print(
        f"peak beside the gradients, in fp32 logits: {most['chunked'] / logits:.3f}, whole {most['whole'] / logits:.3f}"
    )
    assert most["chunked"] < logits / 8 and most["whole"] > 2 * logits
    hidden_TD.grad = None
    with LiveBytes([hidden_TD, weight_VD, targets_T]) as live:
        cross_entropy(hidden_TD @ weight_VD.t(), targets_T).backward()
    assert live.most > logits


def test_what_does_not_fit_is_refused(one_rank):
    hidden_TD, weight_VD, targets_T = drawn(4, 8, 50)
    group = tensor_parallel_group()
    with pytest.raises(ValueError, match=r"targets: have shape \(3,\)"):
        score_tokens(hidden_TD, targets_T[:3], Head(weight_VD, group))
    with pytest.raises(ValueError, match="temperature=0"):
        score_tokens(hidden_TD, targets_T, Head(weight_VD, group), temperature=0)
    with pytest.raises(ValueError, match="vocab_size=51"):
        score_tokens(hidden_TD, targets_T, Head(weight_VD, group, 51))
    for k in (0, 41):
        with pytest.raises(ValueError, match=rf"k={k}: must be at least 1 and at most the 40 tokens"):
            topk_logprobs(hidden_TD, Head(weight_VD, group, 40), k)


def test_equal_tokens_are_in_order_of_their_ids_and_no_positions_have_none(one_rank):
    hidden_TD, weight_VD, _ = drawn(6, 8, 50)
    head = Head(torch.ones_like(weight_VD), tensor_parallel_group(), 40)
    found = topk_logprobs(hidden_TD, head, 7, chunk_logits=100)
    assert torch.equal(found.ids, torch.arange(7).expand(6, 7)) and not found.log_probs.requires_grad
    torch.testing.assert_close(found.log_probs, torch.full((6, 7), 1 / 40).log())
    empty = topk_logprobs(hidden_TD[:0], head, 7)
    assert empty.ids.shape == empty.log_probs.shape == (0, 7) and empty.ids.dtype == torch.int64


def test_the_most_likely_tokens_are_scored_as_targets_are_to_the_last_bit(one_rank):
    hidden_TD, weight_VD, _ = drawn(30, 8, 50)
    head, settings = Head(weight_VD, tensor_parallel_group(), 45), {"temperature": 0.7, "chunk_logits": 350}
    found = topk_logprobs(hidden_TD, head, 5, **settings)
    assert torch.equal(score_tokens(hidden_TD, found.ids, head, **settings).log_probs, found.log_probs)


def test_the_most_likely_tokens_take_the_memory_of_a_few_chunks(one_rank):
    tokens, rows = 512, 4096
    hidden_TD, weight_VD, _ = drawn(tokens, 32, rows)
    with LiveBytes([hidden_TD, weight_VD]) as live:
        topk_logprobs(hidden_TD, Head(weight_VD, tensor_parallel_group()), 8, chunk_logits=tokens * rows // 32)
    logits = tokens * rows * 4
    print(f"peak in fp32 logits: {live.most / logits:.3f}")
    assert live.most < logits / 8
