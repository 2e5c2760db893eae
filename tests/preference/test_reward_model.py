"""A reward model's losses against plain formulas, the position of its score, and the loss on critiques."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.model.build import build_model, native_tensors
from megatron_r1.model.reward_head import HEAD, add_reward_head, head_of, with_head
from megatron_r1.preference.reward_model import RewardModel, pairwise_accuracy, reward_micro_batch
from megatron_r1.train.routing import FROZEN
from tests.support.layouts import model_of
from tests.support.reward_cases import END, PAD, training_examples


@pytest.fixture(scope="module")
def bare(one_rank):
    """The tiny model with a head that is not zero. For reading only."""
    from megatron_r1.config.parallel import ParallelConfig

    model = build_model(model_of("tiny"), ParallelConfig(), one_rank, 0)
    add_reward_head(model)
    FROZEN.apply(model, 0)
    with torch.no_grad():
        head_of(model).weight.copy_(torch.randn(1, 128, generator=torch.Generator().manual_seed(1)) * 0.2)
        head_of(model).bias.fill_(0.3)
    return model


def reward_model(bare, pairwise: bool, weight: float = 0.0) -> RewardModel:
    return RewardModel(bare, pairwise, weight, PAD, "cpu")


def loss_of(bare, pairwise: bool, weight: float, examples, micro_batches: int = 1) -> tuple[float, dict[str, float]]:
    """Mean loss over micro-batches, as megatron-core's schedule computes it, and mean logged values."""
    model_with_head = reward_model(bare, pairwise, weight)
    batches = model_with_head.micro_batches(examples, 0, 1, len(examples) // micro_batches)
    assert len(batches) == micro_batches
    losses, logs = [], []
    for batch in batches:
        with torch.no_grad():
            output, loss_function = model_with_head.forward(bare, batch)
            loss, logged = loss_function(output)
        losses.append(float(loss))
        logs.append({key: float(value) for key, value in logged.items()})
    mean = {key: sum(log[key] for log in logs) / len(logs) for key in logs[0]}
    return sum(losses) / len(losses), mean


def plain_parts(bare, tokens: list[int]) -> tuple[float, torch.Tensor]:
    """Score of the last token, and log-probabilities of every next token, of a sequence on its own."""
    inputs_BL = torch.tensor([tokens])
    hidden = {}

    def keep(*, hidden_states, output_layer, **_):
        hidden["hidden"] = hidden_states[:, 0]
        return output_layer(hidden_states)[0]

    from megatron_r1.model.build import without_multi_token_prediction

    with torch.no_grad(), without_multi_token_prediction(bare):
        logits_LBV = bare(inputs_BL, torch.arange(len(tokens))[None], None, output_processor=keep)
    head = head_of(bare)
    score = float(hidden["hidden"][-1] @ head.weight[0] + head.bias[0])
    return score, logits_LBV[:, 0].log_softmax(-1)


def test_pairwise_loss_is_bradley_terry_on_the_last_token(bare):
    examples = training_examples(True)
    scores = [[plain_parts(bare, sequence.tokens)[0] for sequence in example.sequences] for example in examples]
    expected = sum(-math.log(1 / (1 + math.exp(rejected - chosen))) for chosen, rejected in scores) / len(scores)
    loss, logged = loss_of(bare, True, 0.0, examples)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert logged["train/accuracy"] == sum(chosen > rejected for chosen, rejected in scores) / len(scores)
    assert loss_of(bare, True, 0.0, examples, micro_batches=4)[0] == pytest.approx(loss, rel=1e-6)


def test_pointwise_loss_is_cross_entropy(bare):
    examples = training_examples(False)
    scores = torch.tensor([plain_parts(bare, example.sequences[0].tokens)[0] for example in examples])
    labels = torch.tensor([float(example.safe) for example in examples])
    assert 0 < labels.mean() < 1
    loss, logged = loss_of(bare, False, 0.0, examples)
    assert loss == pytest.approx(float(F.binary_cross_entropy_with_logits(scores, labels)), rel=1e-5)
    assert logged["train/accuracy"] == float(((scores > 0) == (labels > 0.5)).float().mean())


@pytest.mark.parametrize("pairwise", [True, False])
def test_the_critique_loss_is_the_mean_over_its_tokens(bare, pairwise):
    examples = training_examples(pairwise)
    total, count = 0.0, 0
    for sequence in (sequence for example in examples for sequence in example.sequences):
        log_probs = plain_parts(bare, sequence.tokens)[1]
        for index in range(sequence.loss_start, len(sequence.tokens)):
            total, count = total - float(log_probs[index - 1, sequence.tokens[index]]), count + 1
    for micro_batches in (1, 4):
        loss, logged = loss_of(bare, pairwise, 0.5, examples, micro_batches)
        assert logged["train/reasoning_loss"] == pytest.approx(total / count, rel=1e-5)
        assert loss == pytest.approx(logged["train/score_loss"] + 0.5 * total / count, rel=1e-5)


def test_removing_the_reasoning_changes_the_loss(bare):
    examples = training_examples(True)
    removed = [
        type(e)(tuple(type(r)([*r.tokens[: r.loss_start], END], r.loss_start + 1) for r in e.sequences), e.safe)
        for e in examples
    ]
    whole, without = (loss_of(bare, True, 0.5, each) for each in (examples, removed))
    assert without[1]["train/reasoning_loss"] == 0.0
    assert abs(whole[0] - without[0]) > 0.1
    assert abs(whole[1]["train/score_loss"] - without[1]["train/score_loss"]) > 1e-3, (
        "the score is read after the reasoning"
    )


def test_a_new_head_scores_zero(new_model):
    model = new_model(model_of("tiny"))
    add_reward_head(model)
    assert loss_of(model, True, 0.0, training_examples(True))[0] == pytest.approx(math.log(2))
    assert reward_model(model, True).scores([[5, 6, END]], 4) == [0.0]


def test_scores_do_not_depend_on_the_batch(bare):
    sequences = [sequence.tokens for example in training_examples(True) for sequence in example.sequences]
    together, alone = reward_model(bare, True).scores(sequences, 5), []
    for sequence in sequences:
        alone += reward_model(bare, True).scores([sequence], 1)
    # A score near 0 is a sum of terms as large as those of the largest one, and so are its errors in fp32.
    near = {"rel": 1e-5, "abs": 1e-5 * max(map(abs, alone))}
    assert together == pytest.approx(alone, **near)
    assert together == pytest.approx([plain_parts(bare, sequence)[0] for sequence in sequences], **near)
    assert bare.training, "left as it was"


def test_a_critique_is_greedy_and_ends(bare):
    sequences = [sequence.tokens[:-1] for example in training_examples(False) for sequence in example.sequences]
    for sequence, found in zip(
        sequences, reward_model(bare, False).generate_critiques(sequences, 3, END, 4), strict=True
    ):
        expected = list(sequence)
        for _ in range(4):
            expected.append(int(plain_parts(bare, expected)[1][-1].argmax()))
            if expected[-1] == END:
                break
        assert found == (expected if expected[-1] == END else [*expected, END])


def test_sequences_are_padded_and_know_their_ends():
    batch = reward_micro_batch(
        [sequence for example in training_examples(True) for sequence in example.sequences], PAD, "cpu", 4
    )
    assert batch.inputs_BL.shape[1] % 4 == 0
    assert batch.inputs_BL.gather(1, batch.ends_B[:, None]).eq(END).all()
    in_loss = batch.labels_BL[batch.loss_mask_BL.bool()]
    assert (in_loss == END).sum() == len(batch.ends_B), "the end token of the critique is in the loss too"


def test_ties_count_as_half():
    assert pairwise_accuracy(torch.tensor([1.0, 0.0, -2.0])).tolist() == [1.0, 0.5, 0.0]


def test_weights_without_a_head_get_one_and_an_existing_head_stays(bare):
    tensors = dict(native_tensors(bare))
    assert with_head(tensors, 128)[f"{HEAD}.bias"].item() == pytest.approx(0.3)
    plain = {name: tensor for name, tensor in tensors.items() if HEAD not in name}
    assert with_head(plain, 128).keys() == tensors.keys()
    assert not with_head(plain, 128)[f"{HEAD}.weight"].any()
