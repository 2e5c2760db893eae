"""Sets up training for every verb that trains: process groups, model, optimizer, checkpoints, hooks."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.store import CheckpointStore, step_folders
from megatron_r1.checkpoint.tensors import has_tensors, read_state, read_tensors
from megatron_r1.config.load import resolved
from megatron_r1.config.cross_checks import check_context_parallelism
from megatron_r1.config.performance import refuse_on_cpu, refuse_without_transformer_engine
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, Requeue
from megatron_r1.files import write_whole
from megatron_r1.model.build import build_model
from megatron_r1.model.chunks import Model
from megatron_r1.model.fp8.apply import Fp8Plan, merge_plans
from megatron_r1.model.shards import Shard, load_whole_tensors, shards
from megatron_r1.parallel.comm import AllRanks, all_gather_object, broadcast
from megatron_r1.parallel.heartbeat_file import heartbeat_file
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.parallel.phases import begin_run
from megatron_r1.parallel.watchdog import heartbeat_interval, watchdog
from megatron_r1.platform import Platform, select
from megatron_r1.platform.kernels import refuse_missing_kernels
from megatron_r1.platform.launcher import is_rank_zero, rank
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.provenance import newest_record
from megatron_r1.runs.resume import layout, resume
from megatron_r1.runs.retention import retention_of
from megatron_r1.runs.snapshot import RankZeroSnapshot, Snapshot, random_state
from megatron_r1.config.initial_model import check_same_model
from megatron_r1.runs.initial_weights import InitialModel
from megatron_r1.track.record import read_metrics
from megatron_r1.track.tracker import Tracker
from megatron_r1.train.ema import MovingAverage
from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.hooks.checkpoint import CheckpointHook
from megatron_r1.train.hooks.ema import EmaHook
from megatron_r1.train.hooks.log import LogHook
from megatron_r1.train.hooks.phases import PhaseHook
from megatron_r1.train.hooks.preempt import PreemptHook
from megatron_r1.train.hooks.prometheus import PrometheusHook
from megatron_r1.train.hooks.rewind import RewindHook
from megatron_r1.train.hooks.spikes import SpikeHook
from megatron_r1.train.hooks.profile import profile_hooks
from megatron_r1.train.hooks.rank_times import RankTimesHook
from megatron_r1.train.optimizer import MOMENTS, Optimizer
from megatron_r1.train.optimizer_state import MASTER, OptimizerState
from megatron_r1.train.rewinds import IN_MANIFEST, Rewind, is_undone, read_rewinds, record_rewind
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

ExtraTensors = Callable[[], dict[str, torch.Tensor]]
Row = Mapping[str, Any]
ExtraShards = Callable[[], Iterable[tuple[str, Shard]]]


@dataclass
class TrainingRun:
    """A model in training, with its optimizer and progress."""

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
    """Further tensors of the resumed checkpoint, beside model and optimizer; on rank 0."""
    resumed: Path | None = None
    """The checkpoint from which the run was resumed."""
    ema: MovingAverage | None = None
    """Moving average of the weights, if configured."""
    tracker: Tracker | None = None
    """Records the metrics, on rank 0; `hooks` makes it, and its last hook closes it."""
    rewinds: Sequence[Rewind] = ()
    """How often it went back before a spike, and the data that it skips since."""

    def hooks(
        self,
        shown: Sequence[str],
        verb: str,
        extra_tensors: ExtraTensors = dict,
        extra_shards: ExtraShards = tuple,
        first: Sequence[Hook] = (),
    ) -> Hooks:
        """The hooks that log, save and stop at a signal.

        Args:
            shown: metrics on the terminal.
            verb: of the command line; wandb's job type.
            extra_tensors: returns further tensors for checkpoints, beside model and optimizer; rank 0's are saved.
            extra_shards: returns further sharded tensors: kind and shard.
            first: hooks that precede the others, to add metrics or state.
        """
        train = self.config.train
        retention_of(train, verb)
        start, recorded = self.state.step, read_metrics(self.folder / "metrics.jsonl") if is_rank_zero() else []
        earlier = [row for row in recorded if row["step"] <= start]
        rewinding = self._rewinding(earlier)
        metadata = {"config": resolved(self.config), "layout": layout(self.config)}
        saving = CheckpointHook(
            self.store,
            lambda state: self.snapshot(state, extra_tensors, extra_shards).write,
            metadata | ({IN_MANIFEST: len(self.rewinds)} if self.rewinds else {}),
            train.save_interval,
            start,
            train.async_save,
            lambda: not any(hook.due() for hook in rewinding),
        )
        spikes: list[Hook] = []
        recording: list[Hook] = []
        if is_rank_zero():
            title = f"{verb} {self.config.name}"
            settings = resolved(self.config) | {"provenance": newest_record(self.folder)}
            self.tracker = Tracker(self.folder, settings, self.config.name, self.config.track, verb, start)
            log = LogHook(self.tracker, shown, train.steps, start, train.log_interval, title)
            spikes, recording = self._spikes(earlier), [log, *self._prometheus()]
        threshold, device = self.config.profile.straggler_threshold, self.platform.device
        times = [PhaseHook(), RankTimesHook(train.log_interval, train.steps, threshold, device)]
        averages = [EmaHook(self.ema)] if self.ema else []
        profiles = profile_hooks(
            self.folder, self.config.profile, train.steps, dist.get_rank(), self.platform.name == "cuda"
        )
        # A row is recorded before its step is saved: a run that is killed in between records the row again. In the
        # other order the row would be lost.
        measured = [*first, *averages, *times, *spikes, *rewinding]
        return Hooks([*measured, *recording, saving, *profiles, self.preempt])

    def _spikes(self, earlier: Iterable[Row]) -> list[Hook]:
        sigmas = self.config.watch.spike_sigmas
        return [SpikeHook(sigmas, earlier)] if sigmas else []

    def _rewinding(self, earlier: Iterable[Row]) -> list[RewindHook]:
        """The hook that goes back before a spike, on every rank, if that is configured."""
        watch, folder = self.config.watch, self.folder
        if not watch.max_rewinds:
            return []
        return [
            RewindHook(
                watch,
                self.config.train.steps,
                self.rewinds,
                self.state,
                earlier,
                lambda: [step for step, _ in step_folders(self.store.folder)],
                lambda rewind: record_rewind(folder, rewind),
            )
        ]

    def _prometheus(self) -> list[Hook]:
        track = self.config.track
        return [PrometheusHook(track, self.config.name)] if track.prometheus_port else []

    def saved(self, kind: str) -> WholeTensors | None:
        """Tensors of a kind in the resumed checkpoint; None when it has none."""
        tensors = WholeTensors(self.resumed, kind) if self.resumed else None
        return tensors or None

    def _shards(self, extra: ExtraShards) -> Iterator[tuple[str, Shard]]:
        """Collective: kind and shard of all sharded tensors that this rank saves."""
        yield from (("model", shard) for shard in shards(self.model) if shard.owned)
        yield from OptimizerState(self.model, self.optimizer).shards()
        if self.ema:
            yield from (("ema", shard) for shard in self.ema.shards())
        yield from extra()

    def snapshot(self, state: TrainState, extra_tensors: ExtraTensors, extra_shards: ExtraShards) -> Snapshot:
        """Collective: this rank's part of a checkpoint.

        All collectives are done before anything is written, so that no rank waits for one whose disk failed.
        """
        rank = dist.get_rank()
        snapshot = RankZeroSnapshot(0, state=state, tokenizer=self.tokenizer) if rank == 0 else Snapshot(rank)
        snapshot.add(self._shards(extra_shards), copy=self.config.train.async_save)
        snapshot.tensors["random"] = random_state()
        if rank == 0 and (extra := extra_tensors()):
            snapshot.tensors["extra"] = {name: tensor.clone() for name, tensor in extra.items()}
        return snapshot


@contextmanager
def training_run(
    config: RunConfig,
    tokenizer: Tokenizer,
    initial: InitialModel | None,
    trainable: Callable[[str], bool] = lambda _: True,
    prepare: Callable[[Model], None] = lambda _: None,
) -> Iterator[TrainingRun]:
    """Set up training: from the run's newest checkpoint, else from `initial`, else from random initial weights.

    Args:
        config: of the run.
        tokenizer: saved with every checkpoint.
        initial: whose weights the run starts from; None initialises at random.
        trainable: parameter name -> whether the optimizer changes it.
        prepare: adds modules that a language model does not have, before weights are loaded.
    """
    begin_run()
    folder = open_run_folder(config)
    platform = select(config.platform)
    check_platform(config, platform)
    retention = retention_of(config.train)
    interval_s = heartbeat_interval(config.watch)
    with (
        watchdog(config.watch, folder / "logs", rank()),
        process_groups(
            platform, config.parallel, config.seed, config.threads, config.distributed_timeout_minutes, interval_s
        ),
        heartbeat_file(folder, interval_s) if is_rank_zero() else nullcontext(),
        CheckpointStore(folder / "checkpoints", retention, AllRanks()) as store,
    ):
        # Up to here a signal ends the process at once: a rank that waits for a dead rank would never check a flag.
        preempt = PreemptHook(config.train.save_before_limit_s)
        model = build_model(config.model, config.parallel, platform, config.seed, config.performance, config.fp8)
        prepare(model)
        log_precision(model, folder)
        if initial:
            check_same_model(config.model, initial.model, str(initial.folder))
        rewinds: list[Rewind] = broadcast(read_rewinds(folder) if is_rank_zero() else None)
        if rewinds:
            store.discard(lambda manifest: is_undone(manifest.metadata, rewinds))
        saved = store.newest_verified()
        if initial and not saved:
            load_whole_tensors(model, initial.weights(AllRanks()).tensors)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
        optimizer = Optimizer(model, config.train, config.performance)
        run = TrainingRun(config, platform, folder, model, optimizer, tokenizer, TrainState(), store, preempt, {})
        run.rewinds = rewinds
        if config.train.ema_decay:
            run.ema = MovingAverage(model, config.train.ema_decay)
        if saved:
            found = resume(saved, config, model, optimizer, run.ema)
            run.resumed, run.state, run.extra = found.folder, found.state, found.extra
        log_start(run)
        yield run


def check_platform(config: RunConfig, platform: Platform) -> None:
    """Refuse what the modules of this platform cannot do.

    Raises:
        ConfigError: names the first key.
    """
    if platform.transformer_engine:
        check_context_parallelism(config)
    else:
        refuse_without_transformer_engine(config.performance)
    if platform.name == "cuda":
        refuse_missing_kernels(config.performance)
    else:
        refuse_on_cpu(config.performance)
        if config.train.optimizer.offload:
            allowed = "must be false on a CPU, where moments are in host memory anyway"
            raise ConfigError("train.optimizer.offload", True, allowed)


def log_start(run: TrainingRun) -> None:
    """Log the start of the run, and where its files are."""
    logger.info(
        "%s: step %d of %d, ranks: %d (%s), metrics in %s",
        run.folder,
        run.state.step,
        run.config.train.steps,
        dist.get_world_size(),
        run.platform.name,
        run.folder / "metrics.jsonl",
    )


def log_precision(model: Any, folder: Path) -> None:
    """Collective: log which linear layers use FP8, if any; writes their formats to `precision.json`."""
    plan: Fp8Plan | None = getattr(model, "fp8_plan", None)
    if plan is None:
        return
    plan = merge_plans(all_gather_object(plan))
    if dist.get_rank() == 0:
        write_whole(folder / "precision.json", json.dumps(asdict(plan), indent=1).encode())
        print("\n".join(plan.lines()), file=sys.stderr)


def limit_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config with at most this number of steps.

    Raises:
        ConfigError: the steps are too few for the schedule.
    """
    if steps >= config.train.steps:
        return config
    try:
        return replace(config, train=replace(config.train, steps=steps))
    except ConfigError as error:
        raise error.under("train") from None


def finish_run(run: TrainingRun, state: TrainState) -> None:
    """Mark the run as done, or raise Requeue when a signal stopped it.

    Raises:
        Requeue: a signal stopped the run before its last step.
    """
    if state.step >= run.config.train.steps:
        if dist.get_rank() == 0:
            mark_done(run.folder, state.as_dict())
        return
    raise Requeue(f"{run.preempt.reason}: stopped after step {state.step} with a checkpoint; the same command resumes the run")
