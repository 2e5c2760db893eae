"""The in-process engine against a full forward pass of the same model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError
from megatron_r1.platform import Platform
from megatron_r1.rollout.engine import Request, Sampling
from tests.support.layouts import model_of
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of


@pytest.fixture
def model(tiny):
    return tiny


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist()
    return [tuple(torch.randint(5, 512, (length,), generator=generator).tolist()) for length in lengths]


def full_log_probs(model, completion, temperature: float) -> torch.Tensor:
    from megatron_r1.model.build import without_multi_token_prediction

    tokens = row_of(completion)
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad(), without_multi_token_prediction(model):
        log_probs_LV = (model(tokens, positions, None)[0] / temperature).log_softmax(-1)
    start = len(prompt_of(completion)) - 1
    chosen = torch.tensor(tokens_of(completion))
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
        assert (logprobs_of(completion) - expected).abs().max() < 1e-5
        ended = tokens_of(completion)[-1] < 20
        assert ended == (completion.finish_reason == "stop")
        assert not any(token < 20 for token in tokens_of(completion)[:-1])


def test_a_prompt_and_response_beyond_the_context_are_refused(model):
    from megatron_r1.rollout.in_process import LocalEngine

    engine, length = LocalEngine(model, batch_size=8, pad_token=0), model.max_sequence_length
    fits = Sampling(0.0, 1.0, 2, (0,), 0)
    assert len(engine.generate([Request("a", (5,) * (length - 2))], fits)) == 1
    allowed = rf"with the {length - 1} prompt tokens of request b at most {length} in all"
    with pytest.raises(ConfigError, match=rf"^rollout.max_response_tokens=2: {allowed}"):
        engine.generate([Request("a", (5,)), Request("b", (5,) * (length - 1))], fits)


def test_draws_follow_the_seed(model):
    from megatron_r1.rollout.in_process import LocalEngine

    engine = LocalEngine(model, batch_size=8, pad_token=0)
    requests = [Request(str(i), prompts(1)[0]) for i in range(8)]

    def draw(seed):
        sampling = Sampling(1.0, 1.0, 8, (), seed)
        return [tokens_of(c) for c in engine.generate(requests, sampling)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 1


def test_greedy_takes_the_most_likely_token_and_a_tiny_nucleus_does_too(model):
    from megatron_r1.rollout.in_process import LocalEngine

    engine = LocalEngine(model, batch_size=4, pad_token=0)
    requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts(4))]
    greedy = engine.generate(requests, Sampling(0.0, 1.0, 8, (), 0))
    nucleus = engine.generate(requests, Sampling(1.0, 1e-6, 8, (), 0))
    assert [tokens_of(c) for c in greedy] == [tokens_of(c) for c in nucleus]
    for completion in greedy:
        log_probs = full_log_probs(model, completion, 1.0)
        assert (logprobs_of(completion) - log_probs).abs().max() < 1e-5


def test_samples_do_not_depend_on_how_many_are_decoded_at_once(model):
    from megatron_r1.rollout.in_process import LocalEngine

    requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts(4) * 4)]
    sampling = Sampling(1.0, 0.95, 24, tuple(range(30)), 5)
    all_at_once, few = (LocalEngine(model, size, 0).generate(requests, sampling) for size in (16, 3))
    assert [tokens_of(c) for c in all_at_once] == [tokens_of(c) for c in few]
    assert len({len(tokens_of(c)) for c in few}) > 5  # ends of all kinds


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_by_their_probability(temperature, top_p):
    """Evenly spaced draws give each token its share of them, to one draw."""
    from megatron_r1.rollout.in_process import draw

    probs_V = torch.tensor([0.0, 0.3, 0.05, 0.4, 0.0, 0.25, 0.0], dtype=torch.float64)
    count = 10_000
    logits_BV = probs_V.log().float().expand(count, -1)
    draws_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    draws_B[[0, -1]] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    token_B, logprob_B = draw(logits_BV, Sampling(temperature, top_p, 1, (), 0), draws_B)
    tempered_V = probs_V ** (1 / temperature)
    tempered_V /= tempered_V.sum()
    kept_V = tempered_V.where(tempered_V >= 0.3, 0.0) if top_p < 1 else tempered_V
    expected_V = kept_V / kept_V.sum()
    assert (token_B.bincount(minlength=7) / count - expected_V).abs().max() < 1.5 / count
    assert not expected_V[token_B].eq(0).any()
    torch.testing.assert_close(logprob_B.double(), tempered_V.log()[token_B], rtol=0, atol=1e-6)


@pytest.mark.parametrize("transformer_engine", [True, False])
def test_sampling_step_by_step_is_refused_where_transformer_engine_trains_in_fp8(model, transformer_engine):
    """Outside of its FP8 context it multiplies in 16 bits, so that a policy would not sample as it is trained."""
    from megatron_r1.commands.grpo import rollout_engine

    config = load("grpo", ["init.from=x", "rollout.engine=local", "fp8.enabled=true"])
    platform = Platform("cpu", "gloo", transformer_engine)
    run = SimpleNamespace(config=config, platform=platform, model=model, tokenizer=SimpleNamespace(pad=0))
    engine = rollout_engine(run, Path(), None, None)
    if not transformer_engine:
        with engine as (local, _):
            assert local.health() == {}
        return
    with pytest.raises(ConfigError, match=r"^rollout\.engine=local: must be sglang with fp8"), engine:
        pass
