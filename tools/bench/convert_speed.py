"""Throughput of conversions beside `cp` with fsync of the same bytes, in the same run.

`tools/bench/convert_speed.py [--layers 8] [--rounds 5] [--workers 1] [--folder runs/convert_speed]`

A DeepSeek-V3 shape of a seventh of the width, in bf16: exported in BF16 and in FP8, and both imported again. What is
timed is all that `megatron-r1 convert` does once it has started: verifying a checkpoint, reading, converting, hashing
for the audit, writing, fsync and publishing. A rate is the bytes that were read per second. Copies and conversions take
turns, so that other work on the machine meets both; a ratio is taken within a turn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.checkpoint.tensor_file import TensorFile
from megatron_r1.commands.convert import run
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import InitConfig, RunConfig
from megatron_r1.config.schema import resolved
from megatron_r1.files import sync
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.target import NativeTarget


@dataclass(frozen=True)
class Case:
    """One conversion."""

    title: str
    source: str
    """Run folder, under the benchmark's folder, that it reads."""
    settings: dict[str, Any]


CASES = (
    Case("export, BF16 to BF16", "native", {"dtype": "bf16"}),
    Case("export, BF16 to FP8", "native", {"dtype": "fp8"}),
    Case("import, BF16 to BF16", "bf16", {"to": "native"}),
    Case("import, FP8 to BF16", "fp8", {"to": "native"}),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/convert_speed"))
    return parser.parse_args()


def shape(layers: int) -> ModelConfig:
    """DeepSeek-V3's proportions, 16 experts of the full 256: about 64 M parameters a layer."""
    model = load("convert", ["model=v3_671b"]).model
    moe = replace(model.moe, num_experts=16, ffn_hidden_size=1024, first_dense_layers=1)
    return replace(
        model,
        num_layers=layers,
        hidden_size=1024,
        num_attention_heads=16,
        ffn_hidden_size=4096,
        vocab_size=16384,
        moe=moe,
    )


def write_source(model: ModelConfig, run_folder: Path) -> None:
    """A run with one checkpoint of random weights."""
    target, generator = NativeTarget("bf16"), torch.Generator().manual_seed(0)
    entries = [entry for mapping in param_mappings(model) for entry in target.entries(mapping)]

    def write(folder: Path) -> None:
        numbered, metadata = target.header(entries)
        with TensorFile(folder / target.file_name(0, 1), numbered, metadata) as file:
            for entry, stored in zip(entries, numbered, strict=True):
                file.write(stored.name, (torch.randn(entry.shape, generator=generator) * 0.02).to(entry.dtype))
            file.close()

    with CheckpointStore(run_folder / "checkpoints") as store:
        store.commit(0, write, {"config": {"model": resolved(model)}, "layout": {}})


def timed(action: Callable[[], None]) -> float:
    os.sync()  # what others left to be written is not ours
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def copied(files: list[Path], target: Path) -> None:
    """cp, and every copy on disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    subprocess.run(["cp", "--reflink=never", *map(str, files), str(target)], check=True)
    for file in target.iterdir():
        sync(file)


def weights_of(source: str, folder: Path) -> tuple[str, list[Path]]:
    """What `init.from` says for a case's source, and its files."""
    run_folder = folder / source
    if source == "native":
        (checkpoint,) = (run_folder / "checkpoints").glob("step-*")
        return str(run_folder), list(checkpoint.glob("*.safetensors"))
    return f"hf:{run_folder / 'hf'}", list((run_folder / "hf").glob("*.safetensors"))


@lru_cache
def recipe() -> RunConfig:
    return load("convert")


def convert(case: Case, source: str, folder: Path, name: str, workers: int) -> None:
    config = replace(
        recipe(),
        init=InitConfig(from_=source),
        root=str(folder),
        name=name,
        convert=ConvertConfig(**case.settings, workers=workers, max_shard_gb=0.25),
    )
    run(config)


def main() -> None:
    given = arguments()
    shutil.rmtree(given.folder, ignore_errors=True)
    model = shape(given.layers)
    write_source(model, given.folder / "native")
    for case in CASES[:2]:
        convert(case, str(given.folder / "native"), given.folder, case.settings["dtype"], 1)
    rates: dict[str, list[float]] = {case.title: [] for case in CASES}
    ratios: dict[str, list[float]] = {case.title: [] for case in CASES}
    for _ in range(given.rounds):
        for case in CASES:
            source, files = weights_of(case.source, given.folder)
            size = sum(file.stat().st_size for file in files)
            shutil.rmtree(given.folder / "out", ignore_errors=True)
            copy_s = timed(partial(copied, files, given.folder / "copy"))
            shutil.rmtree(given.folder / "copy")
            convert_s = timed(partial(convert, case, source, given.folder, "out", given.workers))
            rates[case.title].append(size / convert_s)
            ratios[case.title].append(copy_s / convert_s)
    shutil.rmtree(given.folder)
    print(f"{given.rounds} rounds, {given.workers} processes, {os.cpu_count()} cores; median (all)")
    for case in CASES:
        every = " ".join(f"{rate / 1e6:.0f}" for rate in rates[case.title])
        beside = " ".join(f"{ratio:.2f}" for ratio in ratios[case.title])
        rate, ratio = statistics.median(rates[case.title]) / 1e6, statistics.median(ratios[case.title])
        print(f"{case.title:<24} {rate:>6.0f} MB/s read ({every})   {ratio:.2f} of cp ({beside})")


if __name__ == "__main__":
    main()
