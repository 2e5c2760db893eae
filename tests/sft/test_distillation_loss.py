"""Distillation from the most likely tokens: against the divergence over the whole vocabulary, and its gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.sft.distillation_loss import TAILS, distillation_loss


def pair(tokens: int = 30):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(5, tokens, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))


@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_give_the_whole_divergence(tail):
    student, teacher = pair()
    exact = (teacher.exp() * (teacher - student)).sum(-1)
    torch.testing.assert_close(distillation_loss(student, teacher, tail), exact, rtol=1e-9, atol=1e-9)


def test_the_rest_is_one_event_and_bounds_the_divergence_from_below():
    student, teacher = pair()
    top = teacher.topk(8)
    found = distillation_loss(student.gather(-1, top.indices), top.values)
    p, q = student.exp().gather(-1, top.indices), top.values.exp()
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    torch.testing.assert_close(found, (q * (q / p).log()).sum(-1))
    assert (found > 0).all() and (found < (teacher.exp() * (teacher - student)).sum(-1)).all()
    renormalised = distillation_loss(student.gather(-1, top.indices), top.values, "renormalise")
    p, q = (x[:, :8] / x[:, :8].sum(-1, keepdim=True) for x in (p, q))
    torch.testing.assert_close(renormalised, (q * (q / p).log()).sum(-1))
    assert not torch.allclose(found, renormalised)


@pytest.mark.parametrize("tail", TAILS)
def test_gradient_equals_numerical_gradient_and_vanishes_at_the_teacher(tail):
    student, teacher = pair(6)
    student, teacher = (x[:, :3].clone() for x in (student, teacher))
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, tail, temperature=2.0), student.requires_grad_()
    )
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    log_probs = logits.log_softmax(-1)[:, :4]
    distillation_loss(log_probs, log_probs.detach(), tail).sum().backward()
    assert (logits.grad.norm() < 1e-12) == (tail != "drop")


def test_a_certain_teacher_stays_finite_and_an_unknown_tail_is_refused():
    certain = torch.tensor([[0.0, -80.0]], requires_grad=True)
    loss = distillation_loss(certain, torch.tensor([[0.0, -90.0]]))
    loss.sum().backward()
    assert loss.isfinite().all() and certain.grad.isfinite().all()
    with pytest.raises(ValueError, match="tail=head"):
        distillation_loss(certain, certain, "head")
