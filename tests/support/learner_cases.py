"""A small rollout, and what a learner's update of it is compared with: tests/rl."""

from __future__ import annotations

import torch

from megatron_r1.config.run import RunConfig
from megatron_r1.model.build import native_tensors
from megatron_r1.rollout.sample import Sample
from tests.support.float64 import DTYPE
from tests.support.layouts import model_of
from tests.support.plain_grpo import response_log_probs
from tests.support.samples import make_sample

LENGTHS = ((5, 7), (5, 3), (9, 12), (9, 1))
REWARDS = (1.1, 0.1, 0.0, 1.0)


def config_of(shape: str = "tiny", **rl) -> RunConfig:
    """For use inside `float64()`."""
    config = RunConfig(model=model_of(shape))
    config.model.dtype = DTYPE
    config.model.moe.sequence_loss_coefficient = 0.0
    config.rollout.temperature = 0.7
    config.train.optimizer.max_grad_norm = 0.0
    settings = {
        "prompts_per_rollout": 2, "group_size": 2, "updates_per_rollout": 1, "kl_coefficient": 0.05,
        "tokens_per_micro_batch": 1000, **rl,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(config.rl, name, value)
    return config


def trainable(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("mtp."))
    return model


def make_samples(model, noise: float) -> list[Sample]:
    """Two groups of two responses whose log-probabilities are the model's own, plus noise."""
    generator = torch.Generator().manual_seed(2)
    samples = []
    for index, ((prompt_length, length), reward) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        prompt = tuple(torch.randint(5, 512, (prompt_length,), generator=generator).tolist())
        response = tuple(torch.randint(5, 512, (length,), generator=generator).tolist())
        with torch.no_grad():
            own = response_log_probs(model, prompt, response, 0.7)
        shifted = (own + noise * torch.randn(length, generator=generator)).clamp(max=0.0).tolist()
        samples.append(
            make_sample(
                prompt_id=f"p{index // 2}",
                group=index // 2,
                prompt_tokens=prompt,
                response_tokens=response,
                logprobs=tuple(shifted),
                reward=reward,
                reward_parts={"accuracy": reward},
            )
        )
    return samples


def shifted_reference(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = native_tensors(model)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in tensors
    }


def assert_close(found: dict, expected: dict) -> float:
    """Gradients in float64 that differ by what it rounds: by 6e-15 of their norm where tokens of both signs cancel."""
    worst = 0.0
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            assert not found[name].any(), name
            continue
        worst = max(worst, float((found[name] - gradient).norm() / gradient.norm()))
    assert worst < 1e-12, worst
    return worst


def two_models(new_model, config):
    """A model and the reference that it is learnt beside, as a model of its own."""
    model, other = trainable(new_model(config.model)), new_model(config.model)
    shifted = shifted_reference(model)
    for name, tensor in native_tensors(other):
        tensor.copy_(shifted[name])
    return model, other
