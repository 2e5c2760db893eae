"""Every training verb for six steps, on Transformer Engine or on torch's parts, and stopped half way: test_verbs.py.

python [-m tests.transformer_engine] verbs.py FOLDER [VERB ...] runs them in FOLDER, one after the other in one process;
on Transformer Engine once more, stopped by a signal after three steps and gone on with. GRPO samples with the
in-process engine; six rollouts are also learnt from without one, of recorded responses: FOLDER/grpo.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

STEPS, STOP_AFTER = 6, 3
STOPPED = 85
"""Exit status of a run that a signal ended."""
RUN = (
    "platform=cpu", "threads=1", "track=off", "seed=3", f"train.steps={STEPS}", "train.schedule.warmup_steps=0",
    "train.save_interval=100", "train.log_interval=1",
)  # fmt: skip
GENERATED = ("data=assistant", "train.global_batch_size=4", "train.micro_batch_size=2")
VERBS = {
    "pretrain": (*GENERATED, "data.num_documents=300", "model.num_layers=2"),
    "sft": ("init.from={}/pretrain", "sft.num_conversations=160", "sft.eval_examples=2", "train.micro_batch_size=4"),
    "reward_model": (
        "init.from={}/pretrain", *GENERATED, "reward_model.num_examples=60", "reward_model.eval_examples=2",
    ),
    "dpo": ("init.from={}/pretrain", *GENERATED, "dpo.num_pairs=60", "dpo.eval_examples=2"),
    "grpo": (
        "init.from={}/pretrain", "rollout=local", "rollout.max_response_tokens=12", "rl.prompts_per_rollout=2",
        "rl.group_size=4", "rl.updates_per_rollout=1", "rl.kl_coefficient=0.01", "reward.language=1",
    ),
}  # fmt: skip


def main(folder: Path, verbs: list[str]) -> None:
    from megatron_r1.platform import select

    platform = select("cpu")
    for verb in verbs or VERBS:
        if verb == "grpo" and not platform.transformer_engine:
            continue  # what it samples is not compared with another backend's: rounding chooses other tokens
        assert run(folder, verb, verb) == 0, verb
        if platform.transformer_engine:
            assert run(folder, verb, f"{verb}-stopped", stop=True) == STOPPED, verb
            assert run(folder, verb, f"{verb}-stopped") == 0, verb
    (folder / "grpo.json").write_text(json.dumps(learn(platform)))


def run(folder: Path, verb: str, name: str, stop: bool = False) -> int:
    """Exit status of a run; with `stop` a signal comes while the update of one step is made."""
    from megatron_r1.__main__ import exit_code
    from megatron_r1.train.optimizer import Optimizer

    plain, done = Optimizer.step, 0

    def step(self: Any, learning_rate: float) -> float:
        nonlocal done
        done += 1
        if stop and done == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, learning_rate)

    Optimizer.step = step
    try:
        overrides = (line.format(folder) for line in VERBS[verb])
        return exit_code([verb, *RUN, f"root={folder}", f"name={name}", *overrides])
    finally:
        Optimizer.step = plain


def learn(platform: Any) -> list[dict[str, Any]]:
    """Metrics of some rollouts' updates by GRPO with a reference policy and recorded experts."""
    from megatron_r1.config.load import load
    from megatron_r1.model.names import in_multi_token_layer
    from megatron_r1.model.replay import RoutingReplay
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.rl.learner import Learner
    from megatron_r1.rl.policy.reference import ReferencePolicy
    from megatron_r1.track.metrics import reproducible
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.state import TrainState
    from tests.dist.ranks_layouts import build, post_training, samples

    config = post_training(load("pretrain", ["track=off", "model.num_layers=2", "train.schedule.warmup_steps=0"]))
    with process_groups(platform, config.parallel, seed=0, threads=1):
        model = build(config, platform)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not in_multi_token_layer(name))
        optimizer = Optimizer(model, config.train, config.performance)
        replay = RoutingReplay(model, config.model.moe.first_dense_layers)
        learner = Learner(config, model, optimizer, ReferencePolicy(model), 0, "cpu", replay, None)
        state, rows = TrainState(), []
        for _ in range(STEPS):
            state, row = learner.learn(list(samples(config.model)), state)
            rows.append(reproducible(row))
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
