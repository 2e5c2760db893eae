"""diagnose: finds why the engine of a run and its trainer disagree on log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.store import step_folders
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole
from megatron_r1.model.build import build_model
from megatron_r1.model.replay import RoutingReplay
from megatron_r1.model.shards import load_whole_tensors
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select
from megatron_r1.report.figures import bars, written_alone
from megatron_r1.rl.diagnose.search import Diagnosis, diagnose
from megatron_r1.rl.diagnose.trial import Trial
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.sample import Sample
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.initial_weights import Weights, find_weights

SHOWN = 8
"""Number of possible causes that the terminal shows."""


def run(config: RunConfig) -> None:
    """Compare a saved batch with the weights that it names, and report what explains the difference."""
    batch, checkpoint, samples = choose(config)
    found = find_weights(str(checkpoint))
    folder = open_run_folder(config)
    platform = select(config.platform)
    console = Console(stderr=True)
    with process_groups(platform, config.parallel, config.seed, config.threads, config.distributed_timeout_minutes):
        model = build_model(found.model, config.parallel, platform, config.seed)
        load_whole_tensors(model, dict(found.tensors))
        model.eval()
        moe = found.model.moe
        replay = RoutingReplay(model, moe.first_dense_layers) if moe.num_experts else None
        pad = found.tokenizer().pad
        trial = Trial(model, samples, config.rollout.temperature, pad, config.rl.tokens_per_micro_batch, replay)
        with console.status("") as status:
            others = other_weights(checkpoint, found)
            result = diagnose(trial, others, config.diagnose.tolerance, lambda what: status.update(f"trying: {what}"))
    write_whole(folder / "diagnosis.json", json.dumps(result.as_dict(), indent=1).encode())
    explained = {f"{one.cause.kind}: {one.cause.what}": one.explained for one in result.tried[:SHOWN]}
    if figure := bars("explained", explained, "share of the difference that is explained"):
        write_whole(folder / "diagnosis.svg", written_alone(figure).encode())
    show(result, console, batch, checkpoint)
    mark_done(folder, {"verdict": result.verdict, "mean_gap": result.gap.mean})


def choose(config: RunConfig) -> tuple[Path, Path, list[Sample]]:
    """The batch, the checkpoint whose weights sampled it, and the responses that these weights alone sampled.

    Raises:
        ConfigError: more than one rank, no run, no such batch, or no checkpoint of the weights that it names.
    """
    if config.parallel.fewest_ranks() > 1:
        raise ConfigError("parallel", config.parallel.fewest_ranks(), "must be one rank to diagnose")
    run_folder = Path(config.init.from_)
    if not (run_folder / "checkpoints").is_dir() or not config.init.from_:
        raise ConfigError("init.from", config.init.from_, "must be a run of reinforcement learning, with checkpoints")
    checkpoints = dict(step_folders(run_folder / "checkpoints"))
    if config.diagnose.rollout_file:
        batch = Path(config.diagnose.rollout_file)
        if not batch.is_file():
            raise ConfigError("diagnose.rollout_file", batch, "must be a file of a run's rollouts folder")
        batches = [batch]
    else:
        journal = Journal(run_folder / "rollouts")
        batches = [journal.path(step) for step in reversed(journal.steps())]
    for batch in batches:
        whole = [sample for sample in read(batch) if not sample.version_changes]
        for version in sorted({int(sample.weight_version) for sample in whole} & checkpoints.keys(), reverse=True):
            samples = [sample for sample in whole if sample.weight_version == str(version)]
            return batch, checkpoints[version], samples[: config.diagnose.max_samples or None]
    have = ", ".join(map(str, sorted(checkpoints)))
    key, value = ("diagnose.rollout_file", batches[0]) if config.diagnose.rollout_file else ("init.from", run_folder)
    raise ConfigError(key, value, f"must hold responses sampled with the weights of a checkpoint: {have}")


def read(batch: Path) -> list[Sample]:
    """The responses of a batch."""
    return Journal(batch.parent).read(int(batch.stem.removeprefix("step-"))) or []


def other_weights(checkpoint: Path, found: Weights) -> Mapping[str, Mapping[str, Tensor]]:
    """Weights of the run's other checkpoints; of the earlier ones, the latest comes first."""
    step = int(checkpoint.name.removeprefix("step-"))
    folders = sorted(step_folders(checkpoint.parent), key=lambda pair: (pair[0] > step, abs(pair[0] - step)))
    return {f"step {other}": WholeTensors(folder, "model") for other, folder in folders if other != step}


def show(result: Diagnosis, console: Console, batch: Path, checkpoint: Path) -> None:
    """Print the diagnosis."""
    gap = result.gap
    sizes = f"mean {gap.mean:.3g} nats, largest {gap.largest:.3g}, k1 {gap.k1:.3g}, k3 {gap.k3:.3g}"
    table = Table(title=f"{batch.name} against {checkpoint.name}: difference {sizes}")
    for column in ("if the engine", "explained", "mean left", "largest left"):
        table.add_column(column)
    for one in result.tried[:SHOWN]:
        table.add_row(one.cause.what, f"{one.explained:.1%}", f"{one.gap.mean:.3g}", f"{one.gap.largest:.3g}")
    console.print(table)
    started = [token for token in result.first_tokens if token is not None]
    if started:
        summary = (
            f"{len(started)} of {len(result.first_tokens)} responses differ, from response token {min(started)} on"
        )
        console.print(f"{summary} (median {sorted(started)[len(started) // 2]})", highlight=False)
    for layer, share in result.routing_mismatch_by_layer.items():
        console.print(
            f"layer {layer}: {share:.2%} of the engine's expert choices differ from the trainer's", highlight=False
        )
    if result.associations:
        named = ", ".join(f"{a.expert} of layer {a.layer} ({a.ratio:.2f} times)" for a in result.associations[:3])
        console.print(f"differences are largest for tokens of experts {named}", highlight=False)
    console.print(result.verdict, soft_wrap=True, highlight=False)
