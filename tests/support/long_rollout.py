"""Reinforcement learning on two gloo ranks, of which one takes longer for a rollout than a collective operation may.

python -W ignore -m tests.support.long_rollout FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.fork_server import import_verbs
from tests.support.hangs import RUN as BASE
from tests.support.hangs import run

COLLECTIVE_S, ROLLOUT_S = 8.0, 11.0
RUN = [
    "grpo", "platform=cpu", "threads=1", "track=off", "seed=3", "model.num_layers=2", "model.mtp.num_layers=0",
    "train.schedule.warmup_steps=0", "train.steps=2", "train.save_interval=2",
    "rollout=local", "rollout.max_response_tokens=8", "rl.prompts_per_rollout=2", "rl.group_size=2",
    "rl.updates_per_rollout=1",
    # While it waits, rank 1 has a deadline too.
    "watch.step_deadline_s=60", "watch.heartbeat_deadline_s=60",
]  # fmt: skip


def main(root: Path) -> None:
    import_verbs("pretrain", "grpo")
    from megatron_r1.rl.generation.rollouts import Rollouts
    from megatron_r1.runs import training_run as module

    take, groups, slept = Rollouts.take, module.process_groups, root / "slept"

    def slow(self: Rollouts, step: int, first_prompt: int) -> Any:
        if step == 2:
            time.sleep(ROLLOUT_S)
            slept.write_text("")
        return take(self, step, first_prompt)

    def short(platform: Any, degrees: Any, seed: int, threads: int, _: float, heartbeat_s: float) -> Any:
        return groups(platform, degrees, seed, threads, COLLECTIVE_S / 60, heartbeat_s)

    Rollouts.take, module.process_groups = slow, short  # type: ignore[method-assign, assignment]
    assert set(run(2, root, "undisturbed-pretrain-2", BASE).values()) == {0}
    codes = run(2, root, "long", RUN)
    logs = [(root / f"long-{rank}.log").read_text() for rank in range(2)]
    (root / "found.json").write_text(json.dumps({"codes": codes, "slept": slept.exists(), "logs": logs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
