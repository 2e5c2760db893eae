"""Fine-tuning beside a teacher: the divergence over the whole vocabulary, what it adds to, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_r1.config.model import MtpConfig
from megatron_r1.config.sft import TeacherConfig
from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.names import in_multi_token_layer
from megatron_r1.sft.supervised import SupervisedReader, end_to_end
from megatron_r1.sft.teacher import DistillingReader, Teacher, trained_on
from megatron_r1.train.routing import FROZEN
from tests.support.gradients import gradients_of, worst
from tests.support.layouts import model_of
from tests.support.packing_cases import chat_batch

LENGTH, VOCAB_SIZE = 32, 512
BATCH = chat_batch(6, LENGTH)


@pytest.fixture(scope="module")
def shapes():
    return {"sparse": model_of("tiny"), "dense": model_of("tiny_dense")}


def students_of(new_model, shapes):
    """By kind, with nothing that predicts further than the next token."""
    sparse = replace(shapes["sparse"], mtp=MtpConfig(num_layers=0))
    models = {"sparse": new_model(sparse), "dense": new_model(shapes["dense"])}
    for model in models.values():
        FROZEN.apply(model, 0)
    return models


@pytest.fixture(scope="module")
def students(new_model, shapes):
    return students_of(new_model, shapes)


@pytest.fixture(scope="module")
def untrained(new_model, shapes):
    """The same models, whose gradients go to no optimizer's buffers."""
    return students_of(new_model, shapes)


@pytest.fixture(scope="module")
def teachers(new_model, shapes):
    """By the kind of the student: of another family, width and depth, with head rows beyond the vocabulary."""
    sparse = replace(shapes["sparse"], hidden_size=96, num_layers=2, vocab_size=544)
    dense = replace(shapes["dense"], hidden_size=96, num_layers=2, vocab_size=544)
    return {"sparse": new_model(dense, seed=1), "dense": new_model(sparse, seed=1)}


def reader_of(teacher, vocab_size=VOCAB_SIZE, extra=0, **settings):
    config = TeacherConfig(**settings)
    student_vocab_size = vocab_size if vocab_size < VOCAB_SIZE else None
    return DistillingReader(
        Teacher(teacher, config.top_k, config.temperature, vocab_size), config, student_vocab_size, extra, "cpu"
    )


def logits(model, rows, vocab_size):
    """Logits at the tokens in the loss [N, V], of the vocabulary alone, in float64."""
    inputs_1T, positions_1T, apart = end_to_end(rows)
    with without_multi_token_prediction(model):
        logits_1TV = model(inputs_1T, positions_1T, None, packed_seq_params=apart)
    return logits_1TV[trained_on(rows)][:, :vocab_size].double()


def whole_divergence(student, teacher, rows, vocab_size, temperature):
    """The mean divergence over the tokens in the loss, and gradients, over the whole vocabulary in float64."""
    log_p_NV = (logits(student, rows, vocab_size) / temperature).log_softmax(-1)
    with torch.no_grad():
        log_q_NV = (logits(teacher, rows, vocab_size) / temperature).log_softmax(-1)
    loss = temperature**2 * (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1).mean()
    named = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    empty = (torch.zeros_like(parameter) for parameter in named.values())
    return {
        name: zero if gradient is None else gradient
        for name, gradient, zero in zip(named, gradients, empty, strict=True)
    }, float(loss.detach())


@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, VOCAB_SIZE), (2.0, VOCAB_SIZE), (1.0, 500)])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_all_tokens_give_the_divergence_over_the_whole_vocabulary(
    students, untrained, teachers, kind, temperature, vocab_size
):
    student, teacher = students[kind], teachers[kind]
    batch = ChatBatch(BATCH.tokens_BL % vocab_size, BATCH.document_ids_BL, BATCH.loss_mask_BL)
    reader = reader_of(teacher, vocab_size, top_k=vocab_size, temperature=temperature, weight=1.0)
    micro_batches = reader.micro_batches(batch, 0, 1, 6)
    exact, exact_loss = whole_divergence(untrained[kind], teacher, micro_batches[0], vocab_size, temperature)
    found, loss = gradients_of(student, micro_batches, reader)
    print(f"{kind} {temperature} {vocab_size}: loss {loss / exact_loss - 1:.1e}, gradients {worst(found, exact):.1e}")
    assert loss == pytest.approx(exact_loss, rel=1e-6) and exact_loss > 0.1 and worst(found, exact) < 3e-6


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_teacher_like_the_student_has_nothing_to_say(new_model, shapes, students, kind):
    shape = replace(shapes[kind], mtp=MtpConfig(num_layers=0))
    alike, other = (reader_of(new_model(shape, seed), top_k=16, weight=1.0) for seed in (0, 1))
    found, loss = gradients_of(students[kind], alike.micro_batches(BATCH, 0, 1, 6), alike)
    usual, more = gradients_of(students[kind], other.micro_batches(BATCH, 0, 1, 6), other)
    largest = max(float(found[name].norm() / usual[name].norm()) for name in found if usual[name].any())
    print(f"{kind}: loss {loss:.1e} of {more:.1e}, gradients {largest:.1e} of another teacher's")
    assert abs(loss) < 1e-6 < more and largest < 1e-5


def test_the_loss_is_the_weighted_sum_and_further_predictions_stay_as_they_are(new_model, shapes, teachers):
    student, settings = new_model(shapes["sparse"]), {"extra": 1, "top_k": 16}
    FROZEN.apply(student, 0)
    plain = SupervisedReader(True, 1, "cpu")
    written, written_loss = gradients_of(student, plain.micro_batches(BATCH, 0, 1, 6), plain)
    mixed, alone = (reader_of(teachers["sparse"], weight=weight, **settings) for weight in (0.3, 1.0))
    taught, taught_loss = gradients_of(student, alone.micro_batches(BATCH, 0, 1, 6), alone)
    found, loss = gradients_of(student, mixed.micro_batches(BATCH, 0, 1, 6), mixed)
    assert loss == pytest.approx(0.7 * written_loss + 0.3 * taught_loss, rel=1e-6) and taught_loss != written_loss
    assert worst(found, {name: 0.7 * written[name] + 0.3 * taught[name] for name in found}) < 5e-6
    further = [name for name in found if in_multi_token_layer(name)]
    assert further and worst({n: taught[n] for n in further}, {n: written[n] for n in further}) < 1e-6
    [rows] = mixed.micro_batches(BATCH, 0, 1, 6)
    output, loss_function = mixed.forward(student, rows)
    logged = {name: float(value) for name, value in loss_function(output)[1].items()}
    expected = {"train/loss": loss, "train/cross_entropy": written_loss, "train/distillation_loss": taught_loss}
    assert logged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tail", ["rest", "renormalise", "drop"])
def test_ranks_and_micro_batches_do_not_change_the_gradient(students, teachers, tail):
    reader = reader_of(teachers["dense"], top_k=8, tail=tail, temperature=1.5)
    whole, loss = gradients_of(students["dense"], reader.micro_batches(BATCH, 0, 1, 6), reader)
    shares = [gradients_of(students["dense"], reader.micro_batches(BATCH, rank, 2, 2), reader) for rank in (0, 1)]
    mean = {name: (shares[0][0][name] + shares[1][0][name]) / 2 for name in whole}
    assert worst(mean, whole) < 5e-6 and (shares[0][1] + shares[1][1]) / 2 == pytest.approx(loss, rel=1e-6)


def test_only_tokens_in_the_loss_get_topk_and_the_teacher_stays_unchanged(students, teachers):
    teacher = teachers["sparse"]
    before = [parameter.clone() for parameter in teacher.parameters()]
    reader = reader_of(teacher, vocab_size=500, top_k=9)
    batch = ChatBatch(BATCH.tokens_BL, BATCH.document_ids_BL, BATCH.loss_mask_BL.copy())
    batch.loss_mask_BL[reader.shares(batch, 1)[0][:2]] = False  # nothing to learn in the first micro-batch
    micro_batches = reader.micro_batches(batch, 0, 1, 2)
    counts = [len(rows.topk.ids) for rows in micro_batches]
    assert sum(counts) == int(reader.loss_mask(batch).sum()) and counts[0] == 0 < counts[1]
    for rows in micro_batches:
        assert rows.topk.ids.shape == rows.topk.log_probs.shape == (int(rows.loss_mask_BL.sum()), 9)
        assert (rows.topk.ids < 500).all() and (rows.topk.log_probs.exp().sum(-1) <= 1 + 1e-6).all()
    found, loss = gradients_of(students["sparse"], micro_batches, reader)
    assert loss > 0 and any(gradient.any() for gradient in found.values())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))
