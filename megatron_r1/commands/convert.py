"""convert: a run, a checkpoint or a Hugging Face folder to another format, complete or not at all, with an audit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, FileRecord, needed_for, read_manifest, verify
from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.initial_model import without_unused_layers
from megatron_r1.config.load import resolved
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import GENERATION_FILE, Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.files import hold, read_json
from megatron_r1.hf.audit import AUDIT_FILE, merge_audits
from megatron_r1.hf.config import (
    SpecialTokens,
    generation_config,
    hf_config,
    in_format,
    special_tokens,
    write_json,
)
from megatron_r1.hf.conversion import Conversion, convert_files
from megatron_r1.hf.dry_run import show_index, show_plan
from megatron_r1.hf.export import copy_tokenizer, write_companions
from megatron_r1.hf.folder import INDEX_FILE, refuse
from megatron_r1.hf.model_config import MTP_KEYS, folder_format, model_of_folder, read_folder_config
from megatron_r1.hf.plan import hf_index, totals
from megatron_r1.hf.progress import bytes_on_disk
from megatron_r1.hf.publish import check_replaceable, publish
from megatron_r1.hf.source import FolderSource, NativeSource
from megatron_r1.hf.target import FolderTarget, NativeTarget
from megatron_r1.hf.workspace import ConversionWorkspace, open_workspace
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.initial_weights import check_holds, check_vocabulary
from megatron_r1.runs.source import find_checkpoint, hf_folder


@dataclass(frozen=True)
class Origin:
    """The model to convert."""

    source: NativeSource | FolderSource
    format: str
    """Number format of its weights: fp32, bf16 or fp8."""
    tokenizer_folder: Path
    tokenizer: Tokenizer | None
    """None where the folder has none."""
    held: BinaryIO | None = None
    """Keeps a checkpoint from removal by its run, as long as this object lives."""

    @property
    def model(self) -> ModelConfig:
        return self.source.model


def run(config: RunConfig) -> None:
    """Write the run's ``hf/`` folder, or a checkpoint, from what `init.from` names."""
    settings = config.convert
    if not config.init.from_ and not settings.dry_run:
        raise ConfigError("init.from", "", "convert needs a model: a run, a checkpoint or hf:FOLDER")
    if not config.init.from_:
        show_index(_conversion(None, config.model, config.model.dtype, settings))
        return
    origin = find_origin(config.init.from_, config.init.weights, verified=not settings.dry_run)
    model = without_unused_layers(origin.model, config.model)
    conversion = _conversion(origin.source, model, origin.format, settings)
    if origin.tokenizer:
        key = "convert.vocab_size" if settings.vocab_size else "model.vocab_size"
        check_vocabulary(conversion.model.vocab_size, origin.tokenizer, key)
    found = origin.source.problems()
    if settings.dry_run:
        show_plan(conversion, origin.source.folder, found)
    refuse(origin.source.folder, found)
    if settings.dry_run:
        return
    if isinstance(origin.source, FolderSource) and origin.format == "fp8":
        origin.source.check_scales()
    write = _publish_folder if settings.to == "hf" else _publish_checkpoint
    write(config, origin, conversion, open_run_folder(config))


def find_origin(named: str, which: str, verified: bool) -> Origin:
    """
    Args:
        named: run directory, checkpoint directory, or ``hf:FOLDER``.
        which: weights to read from a checkpoint: ``model`` or ``ema``.
        verified: verify a checkpoint by its manifest first; without, only headers are read.

    Raises:
        As `find_weights`.
    """
    if folder := hf_folder(named):
        if which != "model":
            raise ConfigError("init.weights", which, f"must be model: {named} holds nothing else")
        model, format = model_of_folder(folder), folder_format(folder)
        return Origin(FolderSource(folder, model, format), format, folder, _tokenizer(folder))
    folder, model = find_checkpoint(named, partial(verify, needed=needed_for(which)) if verified else read_manifest)
    check_holds(folder, which)
    held, tokenizer = hold(folder / MANIFEST_NAME), _tokenizer(folder / "tokenizer")
    return Origin(NativeSource(folder, model, which), model.dtype, folder / "tokenizer", tokenizer, held)


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def _conversion(source: Any, model: ModelConfig, format: str, settings: ConvertConfig) -> Conversion:
    wanted = format if settings.dtype == "same" else settings.dtype
    model = replace(model, vocab_size=settings.vocab_size or model.vocab_size)
    target: FolderTarget | NativeTarget = FolderTarget(wanted)
    if settings.to == "native":
        target = NativeTarget("bf16" if wanted == "fp8" else wanted)
        model = replace(model, dtype=target.precision)
    return Conversion(source, target, model, int(settings.max_shard_gb * 1e9))


def _publish_folder(config: RunConfig, origin: Origin, conversion: Conversion, run_folder: Path) -> None:
    target, published = conversion.target, run_folder / "hf"
    assert isinstance(target, FolderTarget)
    companions = _companions(origin, conversion.model, target.format)
    check_replaceable(published)

    def finish(work: ConversionWorkspace, audit: dict[str, Any]) -> Path:
        write_companions(work.files, *companions)
        write_json(work.files / AUDIT_FILE, audit)
        if len(files := conversion.files()) > 1:
            write_json(work.files / INDEX_FILE, hf_index(files))
        publish(work.files, published)
        return published

    _convert(config, conversion, run_folder, finish)


def _publish_checkpoint(config: RunConfig, origin: Origin, conversion: Conversion, run_folder: Path) -> None:
    tree = resolved(config) | {"model": resolved(conversion.model)}
    metadata = {"config": tree, "layout": {"ranks": 1, **asdict(config.parallel)}}

    def finish(work: ConversionWorkspace, audit: dict[str, Any]) -> Path:
        def write(folder: Path) -> dict[str, FileRecord]:
            for name in audit["files"]:
                os.link(work.files / name, folder / name)
            write_json(folder / AUDIT_FILE, audit)
            copy_tokenizer(origin.tokenizer_folder, folder / "tokenizer")
            if origin.tokenizer and (generation := origin.tokenizer.generation):
                write_json(folder / "tokenizer" / GENERATION_FILE, generation)
            # The files were durable before they were recorded.
            return {name: FileRecord(**record) for name, record in audit["files"].items()}

        with CheckpointStore(run_folder / "checkpoints") as store:
            return store.commit(0, write, metadata)

    _convert(config, conversion, run_folder, finish)


def _convert(
    config: RunConfig,
    conversion: Conversion,
    run_folder: Path,
    finish: Callable[[ConversionWorkspace, dict[str, Any]], Path],
) -> None:
    """Write the files, publish them, and print a summary."""
    started, size = time.perf_counter(), totals(conversion.files()).nbytes
    with open_workspace(run_folder / f"{config.convert.to}.tmp", conversion.settings()) as work:
        with bytes_on_disk(work.written_bytes, size, f"convert {config.name}"):
            records = convert_files(conversion, work, config.convert.workers)
        audit = merge_audits({name: record.pop("audit") for name, record in records.items()})
        about = {"source": config.init.from_, "target": repr(conversion.target), "files": records}
        target = finish(work, about | audit)
    seconds = time.perf_counter() - started
    rate = f"{size / 1e6:.1f} MB in {seconds:.2f} s, {len(audit['written'])} tensors in {AUDIT_FILE}"
    Console(stderr=True).print(f"{config.init.from_} -> {target}: {rate}")
    mark_done(run_folder, {"source": config.init.from_, "bytes": size})


def _companions(origin: Origin, model: ModelConfig, format: str) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """The files beside the weights: copied from a Hugging Face folder, else made from the model."""
    if isinstance(origin.source, FolderSource):
        folder = origin.source.folder
        config, path = read_folder_config(folder), folder / GENERATION_FILE
        generation = read_json(path) if path.is_file() else generation_config(SpecialTokens())
        config |= {key: model.mtp.num_layers for key in MTP_KEYS if key in config} | {"vocab_size": model.vocab_size}
        return in_format(config, format), generation, folder
    if not origin.tokenizer:
        return in_format(hf_config(model), format), generation_config(SpecialTokens()), None
    tokens = special_tokens(origin.tokenizer_folder)
    generation = generation_config(tokens, origin.tokenizer.generation_settings())
    return in_format(hf_config(model, tokens), format), generation, origin.tokenizer_folder
