"""Steps of a text at the tokens that end them, however the text was cut into tokens."""

from __future__ import annotations

import random

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic.arithmetic import draw_problem, write_response
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import response_text
from megatron_r1.rewards.steps import RewardedStep, steps_of
from megatron_r1.rl.generation.rollouts import steps_at_tokens

CONFIG = DataConfig(num_documents=400)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CONFIG)


def at_tokens(steps, tokens, tokenizer):
    return steps_at_tokens(steps, tokens, lambda ids: response_text(ids, tokenizer))


@pytest.mark.parametrize("cut", ["as encoded", "anywhere"])
def test_the_token_is_the_first_by_which_the_step_is_complete(tokenizer, cut):
    rng = random.Random(0)
    for _ in range(100):
        problem = draw_problem(rng, CONFIG)
        text, _ = write_response(problem, "careful", "think", rng.choice(["en", "zh"]), rng)
        cut_at = rng.randrange(len(text)) if cut == "anywhere" else 0
        tokens = (*tokenizer.encode(text[:cut_at]), *tokenizer.encode(text[cut_at:]), tokenizer.eos)
        steps = steps_of(problem.question, text)
        assert len(steps) == 2
        for step, (end, value) in zip(steps, at_tokens(steps, tokens, tokenizer), strict=True):
            assert value == step.value
            assert len(tokenizer.decode(tokens[: end + 1])) >= step.end > len(tokenizer.decode(tokens[:end]))


def test_a_character_of_several_tokens_belongs_to_its_last(tokenizer):
    tokens = tokenizer.encode("a\u9f98b")
    assert len(tokens) == 5 and tokenizer.decode(tokens[:2]).endswith("\ufffd")
    steps = [RewardedStep(end, float(end)) for end in (1, 2, 3)]
    assert at_tokens(steps, tokens, tokenizer) == ((0, 1.0), (3, 2.0), (4, 3.0))


def test_a_response_of_one_token_and_one_without_steps(tokenizer):
    token = tokenizer.encode("7")
    assert at_tokens([RewardedStep(1, 0.5)], token, tokenizer) == ((0, 0.5),)
    assert at_tokens([], tokenizer.encode("7 + 1"), tokenizer) == ()
