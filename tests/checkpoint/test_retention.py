"""Which checkpoints stay: the newest, every n-th, the best by a metric, and those that somebody reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, read_manifest, verify
from megatron_r1.checkpoint.retention import Retention
from megatron_r1.checkpoint.sharded import TensorPart, WholeTensors, write_parts
from megatron_r1.checkpoint.store import CheckpointStore, step_folders
from megatron_r1.config.train import TrainConfig
from megatron_r1.errors import ConfigError
from megatron_r1.runs.retention import retention_of
from megatron_r1.train.hooks.checkpoint import CheckpointHook
from megatron_r1.train.state import TrainState


def write(folder: Path) -> None:
    write_parts(folder, "model", 0, [TensorPart("w", (4,), (0,), torch.arange(4.0))])


def steps(folder: Path) -> list[int]:
    return sorted(step for step, _ in step_folders(folder))


def train(folder: Path, retention: Retention, values: Mapping[int, float | None], resume_step: int = 0) -> None:
    """Save after every step, as a run does; `values` are those of the metric, by step."""
    with CheckpointStore(folder, retention) as store:
        hook = CheckpointHook(store, lambda _: write, {}, 1, resume_step)
        for step, value in values.items():
            hook.after_step(TrainState(step=step), {} if value is None else {"eval/loss": value})


def by(values: str) -> dict[int, float | None]:
    """Values of steps 1, 2, ...; - is none."""
    return {step: None if text == "-" else float(text) for step, text in enumerate(values.split(), 1)}


@pytest.mark.parametrize(
    ("retention", "values", "kept"),
    [
        (Retention(2), "3 1 2 5 4 6 7", [6, 7]),
        (Retention(3), "3 1 2 5 4 6 7", [5, 6, 7]),
        (Retention(2, every=3), "3 1 2 5 4 6 7 8", [3, 6, 7, 8]),
        (Retention(2, metric="eval/loss", higher=False), "3 1 2 5 4 6 7", [2, 6, 7]),
        (Retention(2, metric="eval/loss", higher=True), "3 1 2 5 4 4 4", [4, 6, 7]),
        (Retention(2, 3, "eval/loss", False), "3 1 2 5 4 6 7", [2, 3, 6, 7]),
        (Retention(2, metric="eval/loss", higher=True), "3 5 2 5 5 4 4", [2, 6, 7]),  # the earliest of equal ones
        (Retention(2, metric="eval/loss", higher=False), "3 1 2 1 2 3 3", [2, 6, 7]),
        (Retention(2, metric="eval/loss", higher=True), "- - 2 - - 1 -", [3, 6, 7]),
        (Retention(2, metric="eval/loss", higher=True), "3 nan 2 inf - 1 nan", [1, 6, 7]),
        (Retention(2, metric="eval/loss", higher=True), "- - - - - - -", [6, 7]),
        (Retention(2, metric="train/loss", higher=True), "3 1 2 5 4 6 7", [6, 7]),  # another metric is recorded
    ],
)
def test_the_newest_every_nth_and_the_best_stay(
    tmp_path: Path, retention: Retention, values: str, kept: list[int]
) -> None:
    train(tmp_path, retention, by(values))
    assert steps(tmp_path) == kept
    for _, path in step_folders(tmp_path):
        verify(path)
    assert len(kept) <= retention.most_kept(len(by(values)), 1)


def test_a_value_between_two_saves_counts_for_the_next_one(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, Retention(2, metric="eval/loss", higher=False)) as store:
        hook = CheckpointHook(store, lambda _: write, {}, 2, 0)
        for step, row in enumerate([{"eval/loss": 1.0}, {}, {}, {}, {"eval/loss": 2.0}, {}, {}, {}, {}, {}], 1):
            hook.after_step(TrainState(step=step), row)
    assert read_manifest(tmp_path / "step-00000002").metadata["best_by"] == {"metric": "eval/loss", "value": 1.0}
    assert steps(tmp_path) == [2, 8, 10] and "best_by" not in read_manifest(tmp_path / "step-00000008").metadata


def test_a_resumed_run_keeps_the_best_of_before(tmp_path: Path) -> None:
    retention = Retention(2, metric="eval/loss", higher=False)
    train(tmp_path, retention, by("3 1 2 5"))
    train(tmp_path, retention, {4: 5.0, 5: 4.0, 6: 3.0}, resume_step=3)
    assert steps(tmp_path) == [2, 5, 6]
    train(tmp_path, retention, {7: 0.5, 8: 9.0, 9: 9.0}, resume_step=6)
    assert steps(tmp_path) == [7, 8, 9], "a better one takes its place"


def test_the_best_one_with_an_intact_manifest_stays(tmp_path: Path) -> None:
    retention = Retention(2, metric="eval/loss", higher=False)
    train(tmp_path, retention, by("3 2 4 5"))
    (tmp_path / "step-00000002" / MANIFEST_NAME).write_bytes(b"{}")
    train(tmp_path, retention, {5: 6.0}, resume_step=4)
    assert steps(tmp_path) == [3, 4, 5]


READER = """
import pathlib, sys
from megatron_r1.checkpoint.sharded import WholeTensors
with WholeTensors(pathlib.Path(sys.argv[1]), "model") as tensors:
    print("open", flush=True)
    sys.stdin.readline()
    print(tensors["w"].tolist(), flush=True)
"""


def test_a_checkpoint_that_another_process_reads_is_removed_later(tmp_path: Path) -> None:
    train(tmp_path, Retention(2), by("- -"))
    command = [sys.executable, "-c", READER, str(tmp_path / "step-00000001")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin and reader.stdout and reader.stdout.readline() == "open\n"
        train(tmp_path, Retention(2), {3: None, 4: None, 5: None}, resume_step=2)
        assert steps(tmp_path) == [1, 4, 5]
        verify(tmp_path / "step-00000001")
        print(file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "[0.0, 1.0, 2.0, 3.0]\n"
    train(tmp_path, Retention(2), {6: None}, resume_step=5)
    assert steps(tmp_path) == [5, 6]


def test_a_collected_reader_holds_nothing(tmp_path: Path) -> None:
    train(tmp_path, Retention(2), by("- -"))
    tensors = WholeTensors(tmp_path / "step-00000001", "model")
    assert "w" in tensors
    del tensors
    train(tmp_path, Retention(2), {3: None}, resume_step=2)
    assert steps(tmp_path) == [2, 3]


KILLED = """
import os, shutil, sys
from pathlib import Path
import tests.checkpoint.test_retention as t

folder, point = Path(sys.argv[1]), sys.argv[2]
if point == "before_rename":
    t.CheckpointStore._discard = lambda *_: os._exit(9)
else:
    shutil.rmtree = lambda path: (next(path.glob("model-*")).unlink(), os._exit(9))
t.train(folder, t.Retention(2, 4, "eval/loss", False), {5: 9.0}, resume_step=4)
"""


@pytest.mark.parametrize(("point", "left"), [("before_rename", [1, 2, 3, 4, 5]), ("in_removal", [1, 2, 4, 5])])
def test_a_kill_in_a_removal_leaves_what_is_kept(tmp_path: Path, point: str, left: list[int]) -> None:
    train(tmp_path, Retention(4, 4, "eval/loss", False), by("3 1 2 5"))
    train(tmp_path, Retention(4, 4, "eval/loss", False), {})
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), point], cwd=root, timeout=60, check=False)
    assert done.returncode == 9
    with CheckpointStore(tmp_path, Retention(2, 4, "eval/loss", False)) as store:
        assert steps(tmp_path) == left
        for _, path in step_folders(tmp_path):
            verify(path)
        store.prune()
        assert steps(tmp_path) == [2, 4, 5]


def test_fewer_than_two_are_refused() -> None:
    with pytest.raises(ValueError, match="newest=1"):
        Retention(1)


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("sft", {"keep_best": "eval/los"}, "train.keep_best=eval/los: must be a metric that sft records.*eval/loss"),
        ("pretrain", {"keep_best": "eval/loss"}, "must be a metric that pretrain records, such as .*train/loss"),
        ("pretrain", {"keep_best": "moe/load"}, "must be a metric that pretrain records"),
        ("sft", {"keep_best": "train/tokens"}, "train.keep_best_mode=auto: must be max or min"),
    ],
)
def test_a_metric_that_cannot_be_best_is_named(verb: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        retention_of(TrainConfig(**settings), verb)


def test_configured_retention() -> None:
    assert retention_of(TrainConfig(keep_best="eval/loss"), "sft") == Retention(2, 0, "eval/loss", False)
    assert retention_of(TrainConfig(keep_best="eval/loss", keep_best_mode="max"), "sft").higher
    assert retention_of(TrainConfig(keep_best="rollout/reward/accuracy"), "grpo").higher
    assert retention_of(TrainConfig(save_total_limit=5, keep_every=400), "dpo") == Retention(5, 400)
    with pytest.raises(ConfigError, match="keep_every.*multiple of save_interval=200"):
        TrainConfig(keep_every=300)


@pytest.mark.parametrize(
    ("retention", "run", "most"),
    [
        (Retention(2), (1000, 100), 2),
        (Retention(2), (100, 100), 1),
        (Retention(2, every=300), (1000, 100), 4),  # 300 and 600 beside 900 and 1000
        (Retention(2, 300, "eval/loss"), (1000, 100), 5),
        (Retention(2, metric="eval/loss"), (1000, 100), 3),
        (Retention(2, metric="eval/loss"), (200, 100), 2),
    ],
)
def test_most_checkpoints_that_are_kept(retention: Retention, run: tuple[int, int], most: int) -> None:
    """By a simulation of the run, whose best is where it costs most."""
    steps, interval = run
    saved = sorted({*range(interval, steps + 1, interval), steps})
    worst = 0
    for best in saved if retention.metric else [0]:
        for number in range(1, len(saved) + 1):
            now = saved[:number]
            by_step = {step for step in now if retention.every and step % retention.every == 0}
            worst = max(worst, len({*now[-retention.newest :], *by_step, *({best} & {*now})}))
    assert retention.most_kept(*run) == worst == most
