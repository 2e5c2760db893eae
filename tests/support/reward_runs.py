"""Reward models from a base model to a scorer, run in one process: tests/commands/test_reward_model.py.

python reward_runs.py FOLDER pre-trains a small base for some steps; trains a reward model on it, once without a stop
and once stopped by a signal and gone on with; loads the first as a scorer; and writes FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STOP_AFTER = 3
RUN = (
    "track=off",
    "platform=cpu",
    "threads=1",
    "data=assistant",
    "data.num_documents=300",
    "model.num_layers=2",
    "train.schedule.warmup_steps=1",
    "train.save_interval=2",
)
REWARD = (
    "init.from={}/base",
    "reward_model.num_examples=48",
    "reward_model.eval_examples=12",
    "reward_model.eval_interval=4",
    "reward_model.critique_loss_weight=0.5",
    "reward_model.max_critique_tokens=3",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
)
BESIDE = (
    "name=policy", "init.from={}/base", "rollout=local", "rollout.max_response_tokens=8", "train.steps=2",
    "rl.prompts_per_rollout=4", "rl.group_size=4", "rl.updates_per_rollout=1", "reward.accuracy=0", "reward.format=0",
    "reward.helpfulness=0.5", "reward.helpfulness_model={}/whole",
    "reward.harmlessness=2", "reward.harmlessness_model={}/safety",
)  # fmt: skip
"""A policy whose responses two reward models score."""


def main(folder: Path) -> None:
    from megatron_r1.errors import Requeue
    from megatron_r1.platform import select

    select("cpu")
    from megatron_r1.commands import grpo, pretrain, reward_model
    from megatron_r1.train.hooks.eval import EvalHook

    run = partial(run_in, folder)

    def stopping(plain: Callable) -> Callable:
        def after_step(self: EvalHook, state: Any, row: dict) -> None:
            plain(self, state, row)
            if state.step == STOP_AFTER:
                os.kill(os.getpid(), signal.SIGTERM)

        return after_step

    run(pretrain, "pretrain", "name=base", "train.steps=3")
    run(reward_model, "reward_model", "name=whole", *REWARD)
    plain = EvalHook.after_step
    EvalHook.after_step = stopping(plain)
    try:
        run(reward_model, "reward_model", "name=stopped", *REWARD)
        raise AssertionError("was not stopped")
    except Requeue as stopped:
        message = str(stopped)
    EvalHook.after_step = plain
    run(reward_model, "reward_model", "name=stopped", *REWARD)
    run(
        reward_model,
        "reward_model",
        "name=safety",
        *REWARD,
        "reward_model.critique_loss_weight=0.0",
        recipe="reward_safety",
    )
    run(grpo, "grpo", *BESIDE)
    found = {"stopped": message, "scores": score(folder)}
    (folder / "found.json").write_text(json.dumps(found))


def run_in(folder: Path, stage: Any, verb: str, *overrides: str, recipe: str | None = None) -> None:
    from megatron_r1.config.load import load

    lines = [line.format(folder) for line in (*RUN, f"root={folder}", *overrides)]
    stage.run(load(verb, lines, recipe))


def of_the_policy(folder: Path) -> tuple[list[Any], list[Any]]:
    """The samples of the policy's first rollout, and the prompt of each."""
    from megatron_r1.config.load import load
    from megatron_r1.data.prompts.prompts import TrainingPrompts
    from megatron_r1.rollout.journal import Journal

    samples = Journal(folder / "policy" / "rollouts").read(1)
    world = TrainingPrompts(load("grpo", ["data=assistant", "data.num_documents=300"]).data)
    return samples, [world.at(int(sample.prompt_id.removeprefix("train-"))) for sample in samples]


def score(folder: Path) -> dict[str, Any]:
    """Scores of a few responses by the scorers of the runs, together and one by one."""
    import torch

    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.data.prompts.prompts import Prompt
    from megatron_r1.errors import ConfigError
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select
    from megatron_r1.preference.scorer import RewardModelScorer

    prompts = [
        Prompt(str(i), f"Write in capitals: {word}", "", "", "capitals") for i, word in enumerate(("cat", "sun"))
    ]
    responses = ["<think> one</think> <answer> CAT</answer>", "<think> two</think> <answer> sun</answer>"]
    thought = [response.replace(" one", " another thought") for response in responses]
    platform, found = select("cpu"), {}
    with process_groups(platform, ParallelConfig(), seed=0, threads=1):
        for run in ("whole", "safety"):
            before = torch.get_rng_state()
            scorer = RewardModelScorer(str(folder / run), ParallelConfig(), platform)
            found[run] = {
                "name": scorer.name,
                "together": scorer.score(prompts, responses),
                "alone": [scorer.score([p], [a])[0] for p, a in zip(prompts, responses, strict=True)],
                "thought": scorer.score(prompts, thought),
                "draws_nothing": bool((torch.get_rng_state() == before).all()),
            }
        samples, asked = of_the_policy(folder)
        texts = [sample.text for sample in samples]
        found["beside"] = [sample.reward_parts for sample in samples]
        for run in ("whole", "safety"):
            scorer = RewardModelScorer(str(folder / run), ParallelConfig(), platform)
            found[f"{run} of the policy"] = scorer.score(asked, texts)
        for key, run, degrees in (("base", "base", {}), ("divided", "whole", {"tensor": 8})):
            try:
                RewardModelScorer(str(folder / run), ParallelConfig(**degrees), platform, "reward.helpfulness_model")
            except ConfigError as error:
                found[key] = str(error)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
