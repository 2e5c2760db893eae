"""average: the mean of the weights of several runs, checkpoints or Hugging Face folders of one shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, FileRecord
from megatron_r1.checkpoint.sharded import WholeTensors, write_whole_tensors
from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.config.initial_model import check_same_model
from megatron_r1.config.load import resolved
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.hf.load import NativeTensors
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.initial_weights import Weights, find_weights

PROVENANCE = "average.json"
"""File of the checkpoint that says what it is the mean of."""


def run(config: RunConfig) -> None:
    """Write a checkpoint of step 0 that `init.from=RUN` takes."""
    shares = config.average.shares()
    models = find_models(config.average.models)
    first = next(iter(models.values()))
    entries, tokenizer = list(entries_of(first).values()), first.tokenizer()

    def write(folder: Path) -> dict[str, FileRecord]:
        tokenizer.save(folder / "tokenizer")
        (folder / PROVENANCE).write_text(json.dumps(provenance(config, models), indent=1))
        means = (mean((shares[name], models[name].tensors[entry.name]) for name in models) for entry in entries)
        typed = (tensor.to(entry.dtype) for entry, tensor in zip(entries, means, strict=True))
        return write_whole_tensors(folder, "model", entries, typed)

    run_folder = open_run_folder(config)
    tree = resolved(config) | {"model": resolved(first.model)}
    with CheckpointStore(run_folder / "checkpoints") as store:
        target = store.commit(0, write, {"config": tree, "layout": {"ranks": 1, **asdict(config.parallel)}})
    Console(stderr=True).print(f"{len(models)} models -> {target}: {len(entries)} tensors")
    mark_done(run_folder, {"models": config.average.models, "tensors": len(entries)})


def find_models(sources: Mapping[str, str]) -> dict[str, Weights]:
    """The models by name, which differ in nothing but their numbers.

    Raises:
        ConfigError: there are fewer than two, or one has another shape, other tensors or another vocabulary.
    """
    if len(sources) < 2:
        key = "average.models"
        raise ConfigError(key, sources or "{}", f"must name two models at the least: {key}.NAME=RUN for each")
    found = {name: find_weights(source, f"average.models.{name}") for name, source in sources.items()}
    (name_of_first, first), *others = found.items()
    for name, other in others:
        if differs := difference(first, other, sources[name]):
            allowed = f"must differ from average.models.{name_of_first} in its numbers alone: {differs}"
            raise ConfigError(f"average.models.{name}", sources[name], allowed)
    return found


def difference(first: Weights, other: Weights, source: str) -> str:
    """What makes the mean of two models impossible; empty where nothing does."""
    try:
        check_same_model(first.model, other.model, source)
    except ConfigError as error:
        return str(error)
    if not first.tokenizer().has_same_vocabulary(other.tokenizer()):
        return "its vocabulary is another"
    shapes, theirs = ({name: entry.shape for name, entry in entries_of(one).items()} for one in (first, other))
    for name in sorted(shapes.keys() ^ theirs.keys()):
        return f"{name} is in one of them alone"
    for name, shape in shapes.items():
        if theirs[name] != shape:
            return f"{name} has shape {theirs[name]} instead of {shape}"
    return ""


def entries_of(weights: Weights) -> dict[str, Entry]:
    """Types and shapes of its tensors by name, none of which is read."""
    tensors = weights.tensors
    assert isinstance(tensors, WholeTensors | NativeTensors)
    return tensors.entries


def mean(tensors: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The weighted mean of one tensor of several models, in fp32, each read when it is its turn.

    Args:
        tensors: with the models' shares, which add up to 1.
    """
    total = torch.zeros(())
    for share, tensor in tensors:
        total = total + share * tensor.float()
    return total


def provenance(config: RunConfig, models: Mapping[str, Weights]) -> dict[str, Any]:
    """What the checkpoint is the mean of."""
    shares, sources = config.average.shares(), config.average.models
    return {
        name: {"source": sources[name], "share": shares[name], "read": str(found.folder), **dict(digest(found))}
        for name, found in models.items()
    }


def digest(weights: Weights) -> Iterator[tuple[str, str]]:
    """Hash of a checkpoint's manifest, which has the hash of each of its files; a Hugging Face folder has none."""
    path = weights.folder / MANIFEST_NAME
    if path.is_file():
        yield "manifest_sha256", sha256(path.read_bytes()).hexdigest()
