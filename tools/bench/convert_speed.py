"""Conversions beside `cp` of the bytes that they read, with and without fsync, in turns.

`tools/bench/convert_speed.py [--layers 8] [--rounds 5] [--workers 1] [--folder runs/convert_speed]`

A DeepSeek-V3 shape of a seventh of the width, in bf16: exported in BF16 and in FP8, and both imported again, which must
give the first bits back (FP8: those of a second export). What is timed is all that `megatron-r1 convert` does once
it has started: verifying a checkpoint, reading, converting, hashing for the audit, writing, fsync and publishing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from filecmp import cmp
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1.checkpoint.inspect import differences
from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.checkpoint.tensor_file import TensorFile
from megatron_r1.commands.convert import run
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import InitConfig, RunConfig
from megatron_r1.config.schema import resolved
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.target import NativeTarget
from tools.bench.comparison import Way, alternate, describe, seconds_of

REST_S = 1.5
"""Before each way: a disk that has just freed a gigabyte is slow."""


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


def settled(action: Callable[[], object], *there: Path) -> Way:
    """The way whose seconds are those of `action`, begun without the folders `there` and with nothing to write."""

    def way() -> float:
        for folder in there:
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        time.sleep(REST_S)
        return seconds_of(action)()

    return way


def copied(files: list[Path], target: Path, to_disk: bool) -> None:
    """cp, and, where asked for, every copy on disk."""
    target.mkdir(parents=True)
    subprocess.run(["cp", "--reflink=never", *map(str, files), str(target)], check=True)
    if to_disk:
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)


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


def check(folder: Path) -> None:
    """An export and its import must give back what was exported; of FP8, exporting the import again.

    Raises:
        SystemExit: they do not.
    """
    convert(CASES[2], weights_of("bf16", folder)[0], folder, "back", 1)
    convert(CASES[3], weights_of("fp8", folder)[0], folder, "back8", 1)
    convert(CASES[1], str(folder / "back8"), folder, "again8", 1)
    checkpoints = [next((folder / name / "checkpoints").glob("step-*")) for name in ("native", "back")]
    exports = [weights_of(name, folder)[1] for name in ("fp8", "again8")]
    same = [cmp(one, other, shallow=False) for one, other in zip(*map(sorted, exports), strict=True)]
    if next(differences(*checkpoints), None) or not all(same):
        raise SystemExit("an import does not give back what was exported")
    for name in ("back", "back8", "again8"):
        shutil.rmtree(folder / name)


def main() -> None:
    given = arguments()
    shutil.rmtree(given.folder, ignore_errors=True)
    write_source(shape(given.layers), given.folder / "native")
    for case in CASES[:2]:
        convert(case, str(given.folder / "native"), given.folder, case.settings["dtype"], 1)
    check(given.folder)
    print(f"{given.rounds} rounds, {given.workers} processes, {os.cpu_count()} cores; GB read")
    for case in CASES:
        source, files = weights_of(case.source, given.folder)
        copy, out = given.folder / "copy", given.folder / "out"
        found = alternate(
            {
                "cp": settled(partial(copied, files, copy, False), copy),
                "cp, sync": settled(partial(copied, files, copy, True), copy),
                "convert": settled(partial(convert, case, source, given.folder, "out", given.workers), out, copy),
            },
            given.rounds,
        )
        print(f"{case.title}\n{describe(found, 'cp, sync', sum(file.stat().st_size for file in files) / 1e9, 'GB')}")
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
