"""Scores by two ranks of responses that one rank has scored; started by tests/commands/test_reward_model.py.

ranks_scorers.py FOLDER PORT, where reward_runs.py has been: reinforces the same policy on two ranks, each
with other data; scores some of its responses by the same reward models in several layouts, and in steps whose rollouts
are taken ahead; and writes FOLDER/rank-N.json. PORT is free: process groups that are made anew need their own store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "ep2": {"expert": 2}}
RUNS = ("whole", "safety")
RESPONSES, ROWS = 9, 4
"""Responses to score, and sequences of a pass: the first data-parallel rank then needs two passes, the second one."""
STEPS, OF_A_STEP, WEIGHTS = 3, 3, (0.5, 2.0)


def main(folder: Path, port: str) -> None:
    from megatron_r1.platform import select

    platform = select("cpu")
    import torch.distributed as dist

    from megatron_r1.commands import grpo
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.preference import measure
    from megatron_r1.preference.scorer import RewardModelScorer
    from tests.support.reward_runs import BESIDE, of_the_policy, run_in

    run_in(folder, grpo, "grpo", *BESIDE, "name=policy-of-two")
    os.environ["MASTER_PORT"] = port
    measure.BATCH_SIZE = ROWS
    samples, prompts = (part[:RESPONSES] for part in of_the_policy(folder))
    texts = [sample.text for sample in samples]
    with process_groups(platform, ParallelConfig(), seed=0, threads=1):
        found: dict[str, Any] = {}
        for name, degrees in LAYOUTS.items():
            share_out(degrees)
            models = [RewardModelScorer(str(folder / run), ParallelConfig(**degrees), platform) for run in RUNS]
            found[name] = {
                run: {"all": model.score(prompts, texts), "one": model.score(prompts[:1], texts[:1])}
                for run, model in zip(RUNS, models, strict=True)
            }
        found["ahead"], found["ended"] = scored_ahead(models, samples, prompts)
        rank = dist.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def share_out(degrees: dict[str, int]) -> None:
    """Divide the ranks anew: models of an earlier layout must not be used any more."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**{f"{name}_model_parallel_size": size for name, size in degrees.items()})


class Hesitant:
    """A reward model that cannot score the first response of its first call; the same on every rank."""

    def __init__(self, model: Any):
        self._model, self.name, self._called = model, model.name, False

    def score(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
        from megatron_r1.rewards.reward import Unscored

        values = self._model.score(prompts, texts)
        first, self._called = not self._called, True
        return [Unscored("not yet"), *values[1:]] if first else values


def scored_ahead(models: Sequence[Any], samples: Sequence[Any], prompts: Sequence[Any]) -> tuple[list[Any], str]:
    """Rewards that this rank gets in each step, by rollouts ahead on rank 0, and why there are no more."""
    from megatron_r1.platform.launcher import is_rank_zero
    from megatron_r1.rewards.score import Rubric, Weighted
    from megatron_r1.rl.generation.async_rollouts import AsyncRollouts
    from megatron_r1.rl.generation.reward_service import CollectiveRewardService
    from megatron_r1.rl.loop import broadcast_rollout
    from megatron_r1.train.loop import StepUnavailable
    from megatron_r1.train.state import TrainState

    service = CollectiveRewardService(
        [Weighted(weight, Hesitant(model)) for weight, model in zip(WEIGHTS, models, strict=True)]
    )
    rewards, state = [], TrainState()
    with ExitStack() as stack:
        rollouts = None
        if is_rank_zero():
            source = Answered(Rubric(service.rewards, retries=1), samples, prompts)
            begun = AsyncRollouts(source, 1, OF_A_STEP, STEPS + 1, service=service)
            rollouts = stack.enter_context(begun)
        try:
            while True:
                rewards += [sample.reward for sample in broadcast_rollout(rollouts, state, service).samples]
                state = state.advance(data_position=state.data_position + OF_A_STEP)
        except StepUnavailable as unavailable:
            return rewards, str(unavailable)


class Answered:
    """Rollouts of given responses; after some steps there are no more."""

    busy_seconds = 0.0

    def __init__(self, rubric: Any, samples: Sequence[Any], prompts: Sequence[Any]):
        self._rubric, self._samples, self._prompts = rubric, samples, prompts

    def take(self, step: int, first_prompt: int) -> Any:
        from megatron_r1.errors import NoRolloutCapacity
        from megatron_r1.rl.generation.rollouts import Rollout

        if step > STEPS:
            raise NoRolloutCapacity("nobody is there")
        here = slice(first_prompt, first_prompt + OF_A_STEP)
        samples = self._samples[here]
        scores = self._rubric(self._prompts[here], [sample.text for sample in samples])
        rewarded = [replace(sample, reward=score.total) for sample, score in zip(samples, scores, strict=True)]
        return Rollout(rewarded, {})


if __name__ == "__main__":
    signal.alarm(120)  # whatever happens to the launcher, no rank waits for ever
    main(Path(sys.argv[1]), sys.argv[2])
