"""Rollouts stay as long as the run may go on from a checkpoint before them, and no longer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.manifest import MANIFEST_NAME
from megatron_r1.checkpoint.retention import Retention
from megatron_r1.checkpoint.sharded import TensorPart, write_parts
from megatron_r1.checkpoint.store import CheckpointStore, step_folders
from megatron_r1.commands.grpo import PruneJournal
from megatron_r1.config.train import TrainConfig
from megatron_r1.rollout.journal import Journal
from megatron_r1.runs.retention import most_rollouts, retention_of
from megatron_r1.train.hooks.checkpoint import CheckpointHook
from megatron_r1.train.state import TrainState
from tests.support.samples import make_sample


def write(folder: Path) -> None:
    write_parts(folder, "model", 0, [TensorPart("w", (1,), (0,), torch.ones(1))])


@pytest.mark.parametrize(
    ("options", "staleness"),
    [
        ({"save_total_limit": 2}, 0),
        ({"save_total_limit": 2, "keep_every": 6}, 2),
        ({"save_total_limit": 3, "keep_best": "rollout/reward/accuracy"}, 1),
    ],
)
def test_what_the_newest_checkpoints_need_stays_and_is_what_check_counts(options, staleness, tmp_path):
    config = TrainConfig(steps=60, save_interval=3, **options)
    journal, most = Journal(tmp_path / "rollouts"), 0
    with CheckpointStore(tmp_path / "checkpoints", retention_of(config, "grpo")) as store:
        hooks = CheckpointHook(store, lambda _: write, {}, config.save_interval, 0), PruneJournal(journal, store)
        for step in range(1, config.steps + 1):
            for ahead in range(step, min(step + staleness, config.steps) + 1):
                if not journal.path(ahead).exists():
                    journal.write(ahead, [make_sample()])
            most = max(most, len(journal.steps()))
            for hook in hooks:
                hook.after_step(TrainState(step=step), {"rollout/reward/accuracy": 1.0 if step == 3 else 0.0})
            newest = [saved for saved, _ in step_folders(store.folder)][: config.save_total_limit]
            assert {*range(min(newest, default=0) + 1, step + 1)} <= {*journal.steps()}
        assert len(step_folders(store.folder)) > config.save_total_limit or len(options) == 1
    assert most == most_rollouts(config, staleness)


def test_a_save_that_fails_and_a_damaged_checkpoint_keep_what_an_older_one_needs(tmp_path):
    journal = Journal(tmp_path / "rollouts")
    for step in range(1, 31):
        journal.write(step, [make_sample()])
    with CheckpointStore(tmp_path / "checkpoints", Retention(2)) as store:
        store.commit(3, write, {})
        PruneJournal(journal, store).after_step(TrainState(step=3), {})
        assert journal.steps()[0] == 1, "should it be damaged, the run begins anew"
        store.commit(6, write, {})
        PruneJournal(journal, store).after_step(TrainState(step=30), {})  # saves from 9 to 30 failed
        assert journal.steps()[0] == 4
        (store.commit(9, write, {}) / MANIFEST_NAME).unlink()
        store._known_good.discard("step-00000009")
        store.prune()
        PruneJournal(journal, store).after_step(TrainState(step=30), {})
        assert journal.steps()[0] == 4, "3 and 6 are the newest that verify"
