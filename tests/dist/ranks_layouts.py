"""Run on every rank of a layout: pre-training steps and a GRPO update, whose numbers go to files.

Started by test_layouts.py under torchrun with a folder that holds job.json: {"parallel": {...}, "model": {...}}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STEPS = 5
PROMPTS, GROUP = 4, 4


def main(folder: Path) -> None:
    from megatron_r1.config.convert import convert
    from megatron_r1.config.run import RunConfig
    from megatron_r1.platform import select

    config, platform = convert(RunConfig, json.loads((folder / "job.json").read_text())), select("cpu")
    config.train.optimizer.clip_norm = 0.0
    from megatron_r1.parallel.mesh import process_groups

    with process_groups(platform, config.parallel, seed=0, threads=1):
        pretraining = pretrain(config, platform)
        reinforcement = reinforce(config, platform)
    if dist_rank() == 0:
        for name, (numbers, gradients) in {"pretrain": pretraining, "grpo": reinforcement}.items():
            (folder / f"{name}.json").write_text(json.dumps(numbers))
            torch.save(gradients, folder / f"{name}.pt")


def dist_rank() -> int:
    from megatron_r1.parallel.mesh import rank

    return rank()


def pretrain(config: Any, platform: Any) -> tuple[dict, dict]:
    """Losses of some steps, and the whole gradients of the first."""
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.stages.pretrain import _mean_loss, next_token_forward
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.step import update

    model = build_model(config.model, config.parallel, platform, seed=0)
    optimizer = Optimizer(model, config.train)
    group = data_parallel_group()
    generator = torch.Generator().manual_seed(1)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        rows = torch.randint(5, 512, (8, 33), generator=generator)
        mine = rows[dist.get_rank(group) :: dist.get_world_size(group)]
        result = update(model, optimizer, mine.split(2), next_token_forward, 1e-3, 32)
        losses.append(_mean_loss(result))
        norms.append(result.gradient_norm)
        if step == 0:
            gradients = whole_gradients(model)
    return {"losses": losses, "norms": norms}, gradients


def reinforce(config: Any, platform: Any) -> tuple[dict, dict]:
    """Metrics of one GRPO rollout in one mini-batch, and its whole gradients."""
    from megatron_r1.model.build import build_model
    from megatron_r1.rl.learner import Learner
    from megatron_r1.rl.reference import ReferencePolicy
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.state import TrainState

    config.model.moe.sequence_loss_coefficient = config.model.moe.bias_update_rate = 0.0
    config.rl.prompts_per_rollout, config.rl.group_size, config.rl.mini_batches = PROMPTS, GROUP, 1
    config.rl.tokens_per_micro_batch, config.rl.kl_coefficient, config.rollout.temperature = 120, 0.05, 0.7
    model = build_model(config.model, config.parallel, platform, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("mtp."))
    optimizer = Optimizer(model, config.train)
    reference = ReferencePolicy(model)
    for name in sorted(reference.weights):
        reference.weights[name] *= 1.02
    learner = Learner(config, model, optimizer, reference, 0, "cpu")
    _, row = learner.learn(list(samples()), TrainState())
    return row, whole_gradients(model)


def samples() -> Iterator[Any]:
    """Answers of many lengths to prompts of many lengths, off-policy."""
    from megatron_r1.rollout.sample import Sample

    generator = torch.Generator().manual_seed(4)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for group in range(PROMPTS):
        prompt = tuple(torch.randint(5, 512, (draw(3, 12),), generator=generator).tolist())
        for _ in range(GROUP):
            length = draw(1, 20)
            response = tuple(torch.randint(5, 512, (length,), generator=generator).tolist())
            log_probs = tuple((-6.3 + 0.4 * torch.randn(length, generator=generator)).tolist())
            reward = float(draw(0, 3))
            yield Sample(str(group), group, prompt, response, log_probs, "0", "stop", "", reward, {"accuracy": reward})


def whole_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradient buffers, gathered like weights; what has no gradient shows itself and must be equal too."""
    from megatron_r1.hf.gather import whole_tensors

    def gradient(parameter: torch.Tensor) -> torch.Tensor:
        return getattr(parameter, "main_grad", parameter.detach())

    return {name: tensor.clone() for name, tensor in whole_tensors(model, of=gradient)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
