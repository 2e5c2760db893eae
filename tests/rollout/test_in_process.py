"""The in-process engine against a full forward pass of the same model."""

import pytest
import torch

from megatron_r1.rollout.engine import Request, Sampling
from tests.support.layouts import model_of


@pytest.fixture
def model(tiny):
    return tiny


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist()
    return [tuple(torch.randint(5, 512, (length,), generator=generator).tolist()) for length in lengths]


def full_log_probs(model, completion, temperature: float) -> torch.Tensor:
    from megatron_r1.model.build import without_multi_token_prediction

    tokens = torch.tensor([completion.prompt_tokens + completion.response_tokens])
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad(), without_multi_token_prediction(model):
        log_probs_LV = (model(tokens, positions, None)[0] / temperature).log_softmax(-1)
    start = len(completion.prompt_tokens) - 1
    chosen = torch.tensor(completion.response_tokens)
    return log_probs_LV[start:-1].gather(-1, chosen[:, None])[:, 0]


@pytest.mark.parametrize(("shape", "temperature"), [("tiny", 1.0), ("tiny", 0.6), ("tiny_dense", 1.0)])
def test_log_probs_equal_a_full_forward_pass(new_model, shape, temperature):
    from megatron_r1.rollout.in_process import LocalEngine

    model = new_model(model_of(shape))

    requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts(6) + prompts(6))]
    sampling = Sampling(temperature, top_p=1.0, max_tokens=24, stop_tokens=tuple(range(20)), seed=3)
    completions = LocalEngine(model, batch_size=5, pad_token=0).generate(requests, sampling)
    assert [c.request_id for c in completions] == [r.id for r in requests]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        expected = full_log_probs(model, completion, temperature)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5
        ended = completion.response_tokens[-1] < 20
        assert ended == (completion.finish_reason == "stop")
        assert not any(token < 20 for token in completion.response_tokens[:-1])


def test_draws_follow_the_seed(model):
    from megatron_r1.rollout.in_process import LocalEngine

    engine = LocalEngine(model, batch_size=8, pad_token=0)
    requests = [Request(str(i), prompts(1)[0]) for i in range(8)]

    def draw(seed):
        sampling = Sampling(1.0, 1.0, 8, (), seed)
        return [c.response_tokens for c in engine.generate(requests, sampling)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 1


def test_greedy_takes_the_most_likely_token_and_a_tiny_nucleus_does_too(model):
    from megatron_r1.rollout.in_process import LocalEngine

    engine = LocalEngine(model, batch_size=4, pad_token=0)
    requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts(4))]
    greedy = engine.generate(requests, Sampling(0.0, 1.0, 8, (), 0))
    nucleus = engine.generate(requests, Sampling(1.0, 1e-6, 8, (), 0))
    assert [c.response_tokens for c in greedy] == [c.response_tokens for c in nucleus]
    for completion in greedy:
        log_probs = full_log_probs(model, completion, 1.0)
        assert (torch.tensor(completion.logprobs) - log_probs).abs().max() < 1e-5
