"""Reinforcement learning and preference optimization of toy bases, in one process: tests/commands/test_grpo_runs.py.

python grpo_runs.py FOLDER pre-trains a small base and a reward model for some steps; trains by PPO, once without a stop
and once stopped by a signal and gone on with; starts a critic from the reward model; asks FOLDER/questions.jsonl with
rewards of steps; distils the trained policy into the base on-policy; measures the base on general tasks; learns from
pairs of responses, with and without a stop too; learns by rules and a reward model together; and writes
FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

RUN = (
    "track=off",
    "platform=cpu",
    "threads=1",
    "data.num_documents=300",
    "model.num_layers=2",
    "model.mtp.num_layers=0",
    "train.schedule.warmup_steps=0",
    "train.save_interval=2",
)
PPO = (
    "init.from={}/base",
    "rl=ppo",
    "rollout=local",
    "rollout.max_response_tokens=12",
    "rl.prompts_per_rollout=6",
    "rl.group_size=1",
    "rl.updates_per_rollout=2",
    "rl.reference_sync_interval=0",
)
DISTILLED = (
    "init.from={}/base",
    "rl.teacher.from={}/whole",
    "rl=on_policy_distillation",
    "reward=none",
    "rollout=local",
    "rollout.max_response_tokens=12",
    "rl.prompts_per_rollout=8",
    "rl.updates_per_rollout=1",
    "train.steps=2",
)
"""The teacher is what PPO made of the base."""
PROMPT_FILE = (
    "init.from={}/base",
    "data.prompts.path={}/questions.jsonl",
    "data.prompts.max_bad_rows=1",
    "rollout=local",
    "rollout.chat_template=tokenizer",
    "rollout.max_response_tokens=12",
    "rl=process",
    "reward=steps",
    "rl.prompts_per_rollout=4",
    "rl.group_size=2",
    "rl.updates_per_rollout=2",
    "train.steps=2",
)
SCENARIOS = (
    "init.from={}/speaker",
    "data=assistant",
    "data.mixture.rules.world=arithmetic",
    "data.mixture.general.world=assistant",
    "data.mixture.general.from_step=-1",
    "reward.domains.accuracy=reasoning",
    "reward.domains.helpfulness=helpfulness",
    "reward.helpfulness=1",
    "reward.helpfulness_model={}/judge",
    "routing=frozen",
    "rollout=local",
    "rollout.max_response_tokens=12",
    "rl=grpo",
    "rl.prompts_per_rollout=8",
    "rl.group_size=2",
    "rl.updates_per_rollout=1",
    "train.steps=2",
)
"""Rules and a reward model in one rollout, general prompts in the last step alone."""
EXAM = (
    "init.from={}/base",
    "evaluate.benchmark=assistant",
    "evaluate.num_prompts=6",
    "evaluate.samples_per_prompt=2",
    "rollout=local",
    "rollout.max_response_tokens=12",
)
REWARD = (
    "init.from={}/base",
    "data=assistant",
    "reward_model.num_examples=16",
    "reward_model.eval_examples=4",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.steps=2",
)
SPEAKER = ("data=assistant", "model.mtp.num_layers=1")
"""What has multi-token layers, and words for the assistant world."""
DPO = (
    *SPEAKER,
    "init.from={}/speaker",
    "rollout.chat_template=tokenizer",
    "dpo.num_pairs=16",
    "dpo.epochs=3",
    "dpo.eval_examples=6",
    "dpo.eval_interval=4",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.schedule.learning_rate=1e-3",
)


def main(folder: Path) -> None:
    from megatron_r1.config.load import load
    from megatron_r1.errors import Requeue, UserError
    from megatron_r1.platform import select

    select("cpu")
    from megatron_r1.commands import dpo, evaluate, grpo, pretrain, reward_model
    from megatron_r1.train.hooks.eval import EvalHook

    def run(stage: Any, verb: str, *overrides: str) -> None:
        stage.run(load(verb, [line.format(folder) for line in (*RUN, f"root={folder}", *overrides)]))

    def refused(*overrides: str) -> str:
        try:
            run(grpo, "grpo", "name=refused", *PPO, "train.steps=2", *overrides)
        except UserError as error:
            return str(error)
        return "was not refused"

    run(pretrain, "pretrain", "name=base", "train.steps=1")
    run(grpo, "grpo", "name=whole", *PPO, "train.steps=2")

    def stopped(hook: Any, step: int, stage: Any, verb: str, *overrides: str, damaged: str = "") -> str:
        """Stopped by a signal after a step, through a hook; then resumed. Returns the message.

        Args:
            damaged: run whose weights are damaged while the other is resumed.
        """
        plain = hook.after_step

        def stopping(self: Any, state: Any, row: dict) -> None:
            plain(self, state, row)
            if state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        hook.after_step = stopping
        try:
            run(stage, verb, *overrides)
            raise AssertionError("was not stopped")
        except Requeue as stop:
            message = str(stop)
        finally:
            hook.after_step = plain
        if damaged:
            flip_last_bits(folder / damaged)
        run(stage, verb, *overrides)
        if damaged:
            flip_last_bits(folder / damaged)  # whole again, for the tests that read them
        return message

    found = {"stopped": stopped(grpo.PruneJournal, 1, grpo, "grpo", "name=stopped", *PPO, "train.steps=2")}
    run(reward_model, "reward_model", "name=judge", *REWARD)
    still = ("rl.critic.init_from={}/judge", "rl.critic.learning_rate=1e-12", "train.steps=1")
    run(grpo, "grpo", "name=judged", *PPO, *still)
    run(grpo, "grpo", "name=asked", *PROMPT_FILE, "track.wandb=offline", "rl.sample_table_interval=2")
    run(grpo, "grpo", "name=distilled", *DISTILLED)
    run(evaluate, "evaluate", "name=general", *EXAM)
    run(pretrain, "pretrain", "name=speaker", *SPEAKER, "train.steps=2")
    run(dpo, "dpo", "name=preferring", *DPO)
    run(grpo, "grpo", "name=scenarios", *SCENARIOS)
    found["stopped_dpo"] = stopped(EvalHook, 3, dpo, "dpo", "name=stopped_dpo", *DPO, damaged="speaker")
    found["other_vocabulary"] = refused(*DISTILLED, "rl.teacher.from={}/speaker")
    found["no_reward_model"] = refused("rl.critic.init_from={}/base")
    (folder / "found.json").write_text(json.dumps(found))


def flip_last_bits(run: Path) -> None:
    """Flip the last bit of each file of a run's weights."""
    for path in (run / "checkpoints").glob("step-*/model-*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
