"""Run on every rank of a layout: steps of a verb, and how many bytes torch held at each point.

Started by test_measured_memory.py with a folder that holds job.json, jobs of one number of ranks by
name; writes one file a rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.live_bytes import LiveBytes
from tests.support.samples import make_sample

RESPONSES = 4
"""Responses of a micro-batch."""


def main(folder: Path) -> None:
    from megatron_r1.config.run import RunConfig
    from megatron_r1.config.schema import convert
    from megatron_r1.platform import select

    platform, found = select("cpu"), {}
    jobs = json.loads((folder / "job.json").read_text())
    from megatron_r1.parallel.mesh import process_groups

    for name, job in jobs.items():
        config = convert(RunConfig, job["config"])
        os.environ["MASTER_PORT"] = str(job["port"])
        with process_groups(platform, config.parallel, seed=0, threads=1):
            found[name] = measured({"pretrain": updates, "grpo": rollouts}[job["verb"]], config, platform)
        print(name, found[name], flush=True)
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def measured(steps_of: Callable[[Any, Any], Callable[[], Any]], config: Any, platform: Any) -> dict[str, int]:
    """Bytes after a step, and at most during the next one."""
    with LiveBytes(()) as live:
        step = steps_of(config, platform)
        step()
        after, live.most = live.now, live.now
        step()
        return {"updated": after, "peak": live.most}


def updates(config: Any, platform: Any) -> Callable[[], Any]:
    """Steps of pretrain, on one batch."""
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update

    train, group = config.train, data_parallel_group()
    model = build_model(config.model, config.parallel, platform, 0, config.performance)
    optimizer = Optimizer(model, train, config.performance)
    rows = torch.randint(5, config.model.vocab_size, (train.global_batch_size, train.sequence_length + 1))
    mine = rows[dist.get_rank(group) :: dist.get_world_size(group)].split(train.micro_batch_size)
    shape = train.sequence_length, train.micro_batch_size
    return lambda: update(model, optimizer, mine, next_token_forward, 1e-3, *shape)


def rollouts(config: Any, platform: Any) -> Callable[[], Any]:
    """Steps of grpo, on one recorded rollout of responses that fill the micro-batches."""
    from megatron_r1.model.build import build_model
    from megatron_r1.model.reward_head import add_reward_head
    from megatron_r1.rl.advantages.critic import Critic
    from megatron_r1.rl.learner import Learner
    from megatron_r1.rl.policy.reference import ReferencePolicy
    from megatron_r1.runs.post_training import trained_weights
    from megatron_r1.runs.second_model import second_model
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.state import TrainState

    rl, trained, critic = config.rl, trained_weights(config), None
    model = build_model(config.model, config.parallel, platform, 0, config.performance)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    optimizer = Optimizer(model, config.train, config.performance)
    if rl.advantage_estimator == "critic":
        values = second_model(config.model, config.parallel, platform, None, add_reward_head, config.performance)
        for name, parameter in values.named_parameters():
            parameter.requires_grad_(trained(name) and "output_layer" not in name)
        critic = Critic(values, Optimizer(values, config.train, config.performance), rl.critic)
    reference = ReferencePolicy(model) if rl.kl_coefficient else None
    learner = Learner(config, model, optimizer, reference, 0, "cpu", None, critic)
    length, number = rl.tokens_per_micro_batch // RESPONSES, rl.prompts_per_rollout * rl.group_size
    samples = [
        make_sample(
            prompt_id=str(index // rl.group_size),
            group=index // rl.group_size,
            prompt_tokens=row[: length // 2],
            response_tokens=row[length // 2 :],
            reward=float(index % 2),
        )
        for index, row in enumerate(torch.randint(5, config.model.vocab_size, (number, length)).tolist())
    ]
    return lambda: learner.learn(samples, TrainState())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
