"""What every training stage sets up the same way: model, optimizer, checkpoints, hooks, resume."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.checkpoint.tensors import read_state, read_tensors, write_state, write_tensors
from megatron_r1.config.load import resolved
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, Requeue
from megatron_r1.hf.gather import whole_tensors
from megatron_r1.model.build import build_model
from megatron_r1.model.fp8.apply import Fp8Plan, merged
from megatron_r1.model.shards import load_whole_tensors
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import Platform, select
from megatron_r1.stages.session import mark_done, open_run_folder
from megatron_r1.stages.weights import Weights, check_same_model
from megatron_r1.track.tracker import Tracker
from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.hooks.checkpoint import CheckpointHook
from megatron_r1.train.hooks.log import LogHook
from megatron_r1.train.hooks.preempt import PreemptHook
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

ExtraTensors = Callable[[], dict[str, torch.Tensor]]


@dataclass
class Trainer:
    """A model in training and where it stands."""

    config: RunConfig
    platform: Platform
    folder: Path
    model: Any
    optimizer: Optimizer
    tokenizer: Tokenizer
    state: TrainState
    store: CheckpointStore
    preempt: PreemptHook
    extra: dict[str, torch.Tensor]
    """Tensors beside model and optimizer that the resumed checkpoint held."""

    def hooks(self, shown: Sequence[str], title: str, extra_tensors: ExtraTensors = dict) -> Hooks:
        """Log, save, and stop in time.

        Args:
            shown: metrics on the terminal.
            title: name of the progress bar.
            extra_tensors: what a checkpoint holds beside model and optimizer.
        """
        train = self.config.train
        # A row is recorded before its step is saved: killed in between, the run records the row anew; the other way
        # round it would be missing for good.
        hooks: list[Hook] = [
            CheckpointHook(
                self.store,
                lambda folder, state: self._write(folder, state, extra_tensors()),
                {"config": resolved(self.config), "layout": layout(self.config)},
                train.checkpoint_interval,
                self.state.step,
            )
        ]
        if dist.get_rank() == 0:
            tracker = Tracker(self.folder, resolved(self.config), self.config.name, self.config.track, self.state.step)
            hooks.insert(0, LogHook(tracker, shown, train.steps, self.state.step, train.log_interval, title))
        return Hooks([*hooks, self.preempt])

    def _write(self, folder: Path, state: TrainState, extra: dict[str, torch.Tensor]) -> None:
        rank = dist.get_rank()
        whole = list(whole_tensors(self.model))
        if rank == 0:
            write_tensors(folder, "model", 0, whole)
        write_tensors(folder, "optimizer", rank, self.optimizer.tensors())
        write_tensors(folder, "random", rank, {"cpu": torch.get_rng_state()}.items())
        if extra:
            write_tensors(folder, "extra", rank, extra.items())
        if rank == 0:
            write_state(folder, state.as_dict())
            self.tokenizer.save(folder / "tokenizer")


@contextmanager
def trainer(
    config: RunConfig, tokenizer: Tokenizer, weights: Weights | None, trainable: Callable[[str], bool] = lambda _: True
) -> Iterator[Trainer]:
    """Set up training: from the run's newest checkpoint, else from `weights`, else from random initial weights.

    Args:
        config: of the run.
        tokenizer: saved with every checkpoint.
        weights: initial weights; None draws them.
        trainable: parameter name -> whether the optimizer changes it.
    """
    folder = open_run_folder(config)
    platform = select(config.platform)
    with (
        process_groups(platform, config.parallel, config.seed, config.threads),
        CheckpointStore(folder / "checkpoints", config.train.keep_checkpoints, AllRanks()) as store,
    ):
        # Until here a signal ends the process at once: a rank that waits for a dead one would never look at a note.
        preempt = PreemptHook()
        model = build_model(config.model, config.parallel, platform, config.seed, config.precision)
        tell_precision(model, folder)
        if weights:
            check_same_model(config.model, weights.model, str(weights.folder))
            load_whole_tensors(model, weights.tensors)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
        optimizer = Optimizer(model, config.train)
        this = Trainer(config, platform, folder, model, optimizer, tokenizer, TrainState(), store, preempt, {})
        _resume(this)
        yield this


def tell_precision(model: Any, folder: Path) -> None:
    """Collective: say which linear layers multiply in FP8 and how, where any do; `precision.json` names each."""
    plan: Fp8Plan | None = getattr(model, "fp8_plan", None)
    if plan is None:
        return
    plan = merged(AllRanks().gather(plan))
    if dist.get_rank() == 0:
        (folder / "precision.json").write_text(json.dumps(asdict(plan), indent=1))
        print("\n".join(plan.lines()), file=sys.stderr)


def _resume(this: Trainer) -> None:
    found = this.store.newest_verified()
    if not found:
        return
    folder, manifest = found
    if (saved := manifest.metadata["layout"]) != (now := layout(this.config)):
        raise ConfigError("parallel", now, f"must be {saved}, as in {folder}; init.from starts a new run from it")
    rank = dist.get_rank()
    load_whole_tensors(this.model, read_tensors(folder, "model", 0))
    this.optimizer.load(read_tensors(folder, "optimizer", rank))
    torch.set_rng_state(read_tensors(folder, "random", rank)["cpu"])
    if (folder / f"extra-{rank:05d}.safetensors").is_file():
        this.extra = read_tensors(folder, "extra", rank)
    this.state = TrainState(**read_state(folder))
    logger.info("resuming %s at step %d", this.folder, this.state.step)


def layout(config: RunConfig) -> dict[str, int]:
    """How the ranks share the work; optimizer state is stored by rank, so a resume needs the same."""
    return {"ranks": dist.get_world_size(), **asdict(config.parallel)}


def finish(this: Trainer, state: TrainState) -> None:
    """Mark the run done, or leave it to be resumed when a signal stopped it.

    Raises:
        Requeue: a signal stopped the run before its last step.
    """
    if state.step >= this.config.train.steps:
        if dist.get_rank() == 0:
            mark_done(this.folder, state.as_dict())
        return
    name = this.preempt.received.name if this.preempt.received else "a signal"
    raise Requeue(f"{name}: stopped after step {state.step} with a checkpoint; the same command goes on from there")
