"""grpo: reinforcement learning with rule rewards (R1-Zero when it starts from a base model)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_r1.config.run import RunConfig
from megatron_r1.data.prompts import TrainingPrompts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import native_tensors
from megatron_r1.rl.learner import Learner, ReferencePolicy
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rl.rollouts import Rollouts
from megatron_r1.rl.scoring import rule_scorer
from megatron_r1.rollout.choose import SyncedEngine, sglang_engine
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.local import LocalEngine
from megatron_r1.stages.trainer import Trainer, finish, trainer
from megatron_r1.stages.weights import Weights, find_weights
from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.loop import train
from megatron_r1.train.state import TrainState

SHOWN = ("reward", "accuracy", "format", "response_length", "kl", "entropy", "rollout_seconds", "train_seconds")


def run(config: RunConfig) -> None:
    """Reinforce a model, or go on where its run stopped."""
    if not config.init.from_:
        raise ConfigError("init.from", "", "grpo needs a model to start from: a run, a checkpoint or hf:FOLDER")
    weights = find_weights(config.init.from_)
    tokenizer = Tokenizer.load(weights.tokenizer_folder)
    # Answers predict one token at a time: the multi-token layers are carried through untouched.
    with trainer(config, tokenizer, weights, trainable=lambda name: not name.startswith("mtp.")) as this:
        reference = ReferencePolicy(this.model, this.extra) if config.rl.kl_coefficient else None
        if this.state.step >= config.train.steps:
            finish(this, this.state)
            return
        with rollout_engine(this, weights) as engine:
            journal = Journal(this.folder / "rollouts")
            rollouts = Rollouts(
                TrainingPrompts(config.data),
                engine,
                tokenizer,
                journal,
                rule_scorer(config.reward),
                config.rollout,
                config.rl,
                config.seed,
            )
            learner = Learner(config, this.model, this.optimizer, reference, tokenizer.pad, this.platform.device)
            hooks = this.hooks(SHOWN, f"grpo {config.name}", lambda: reference_tensors(reference))
            step = reinforcement_step(rollouts, learner, engine.update_weights)
            state = train(this.state, step, Hooks([hooks, PruneJournal(journal, config.train)]), config.train.steps)
        finish(this, state)


def reference_tensors(reference: ReferencePolicy | None) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold so that a resumed run is penalised towards the same policy."""
    return reference.weights if reference else {}


class PruneJournal(Hook):
    """Drops rollouts that no checkpoint could need again."""

    def __init__(self, journal: Journal, train):
        self._journal = journal
        self._horizon = train.checkpoint_interval * (train.keep_checkpoints + 1)

    def after_step(self, state: TrainState, row: dict) -> None:
        self._journal.prune(before_step=state.step - self._horizon)


@contextmanager
def rollout_engine(this: Trainer, weights: Weights) -> Iterator[SyncedEngine]:
    """The configured engine, holding the trainer's weights under the version of the trainer's step."""
    rollout = this.config.rollout
    if rollout.engine == "local":
        engine = SyncedEngine(LocalEngine(this.model, rollout.batch_size, this.tokenizer.pad), None)
        engine.update_weights(str(this.state.step))
        yield engine
        return
    with sglang_engine(
        rollout,
        this.config.model,
        lambda: native_tensors(this.model),
        weights.tokenizer_folder,
        this.folder / "logs",
        this.platform.name,
    ) as engine:
        engine.update_weights(str(this.state.step))
        yield engine
