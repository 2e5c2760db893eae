"""Checks of files: space for checkpoints and journals, and the weights that a job starts from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.check.finding import Check, Finding, Job, finding_of, passed, refused, unknown, warning
from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.checkpoint.store import step_folders
from megatron_r1.config.load import difference, read_yaml, resolved
from megatron_r1.config.train import TrainConfig
from megatron_r1.errors import UserError
from megatron_r1.memory.parts import GB
from megatron_r1.memory.storage import checkpoint_bytes, journal_bytes_per_rollout
from megatron_r1.runs.folder import FREE_TO_CHANGE, run_folder
from megatron_r1.runs.retention import most_rollouts, retention_of
from megatron_r1.runs.source import find_checkpoint, hf_folder

FILES_OF_RANK = 8
"""Files of a checkpoint for each rank, at most: one of each kind of tensors."""


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def checkpoints_to_come(job: Job) -> int:
    """Checkpoints that need space: those that are kept and the one that is being written, less those that are there."""
    train = job.config.train
    kept = retention_of(train, job.verb).most_kept(train.steps, train.save_interval)
    return kept + 1 - min(len(step_folders(run_folder(job.config) / "checkpoints")), kept)


def _space(job: Job) -> Iterator[Finding]:
    try:
        retention_of(job.config.train, job.verb)
    except UserError as error:
        yield finding_of(error)
        return
    folder = existing(run_folder(job.config))
    size, kept = checkpoint_bytes(job.config, job.verb), checkpoints_to_come(job)
    free = shutil.disk_usage(folder).free
    text = f"{kept} checkpoints, with the one that is being written, of {size / GB:.3g} GB; {free / GB:,.0f} GB free"
    if size * kept > free:
        yield refused(text, f"free space in {folder}, take root=FOLDER elsewhere or {_fewer(job.config.train)}")
    else:
        yield passed(text)
    inodes = os.statvfs(folder).f_favail
    needed = kept * job.ranks * FILES_OF_RANK
    if 0 < inodes < needed:
        yield refused(f"{needed:,} files, and {folder} has room for {inodes:,}", "free inodes, or take another root")


def _fewer(train: TrainConfig) -> str:
    return "a smaller train.save_total_limit" + (" or a larger train.keep_every" if train.keep_every else "")


def _weights(job: Job) -> Iterator[Finding]:
    source = job.config.init.from_
    if source and source not in job.made_before:
        yield from _source(source, job.config.init.weights)
    elif source:
        yield unknown(f"init.from={source}: an earlier stage makes it")
    yield from _same_run(job)


def _source(source: str, which: str) -> Iterator[Finding]:
    try:
        folder = hf_folder(source)
        checkpoint = None if folder else find_checkpoint(source, read_manifest)[0]
    except UserError as error:
        yield finding_of(error)
        return
    damage = _missing_shards(folder) if folder else _damaged_files(checkpoint, which) if checkpoint else ""
    if damage:
        yield refused(f"init.from={source}: {damage}", "copy the folder again, or take another checkpoint")
    else:
        yield passed(f"{source}: every file is there{'' if folder else ' in its size'}; the job compares hashes it has")


def _missing_shards(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    gone = sorted(name for name in names if not (folder / name).is_file())
    return f"{len(gone)} of {len(names)} files are missing, {gone[0]} first" if gone else ""


def _damaged_files(folder: Path, which: str) -> str:
    files = read_manifest(folder).files
    bad = [name for name, record in files.items() if _size(folder / name) != record.size]
    if bad:
        return f"{len(bad)} of {len(files)} files are missing or have another size, {bad[0]} first"
    return "" if any(which in Path(name).parts[0] for name in files) else f"it holds no weights of kind {which}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _same_run(job: Job) -> Iterator[Finding]:
    """A folder with a run of another configuration is refused at the start of a job."""
    pinned = run_folder(job.config) / "config.yaml"
    if not pinned.is_file():
        return
    lines = difference(read_yaml(pinned), resolved(job.config))
    if changes := [line for line in lines if not line.startswith(FREE_TO_CHANGE)]:
        yield refused(f"{pinned.parent} is a run with another configuration: {'; '.join(changes)}", "take another name")
    else:
        yield passed(f"{pinned.parent} goes on")


def _journal(job: Job) -> Iterator[Finding]:
    config, folder = job.config, existing(run_folder(job.config))
    each, kept = journal_bytes_per_rollout(config), most_rollouts(config.train, config.rollout.max_staleness)
    free = shutil.disk_usage(folder).free - checkpoint_bytes(config, job.verb) * checkpoints_to_come(job)
    text = f"{kept} rollouts of at most {each / GB:.3g} GB, beside checkpoints {max(0, free) / GB:,.0f} GB free"
    if kept * each > free:
        change = "free space, or take a smaller train.save_interval, rollout.max_staleness or root=FOLDER elsewhere"
        yield refused(text, change)
    elif kept * each > free / 2:
        yield warning(text, "watch the disk, or take a smaller train.save_interval")
    else:
        yield passed(text)


CHECKS = (
    Check(17, "space for checkpoints", _space, lambda job: job.trains),
    Check(18, "weights to start from, and the run's folder", _weights, lambda job: job.verb != "pipeline"),
    Check(29, "space for journals", _journal, lambda job: job.verb == "grpo"),
)
