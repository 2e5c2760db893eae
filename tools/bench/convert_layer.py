"""One full-size mixture-of-experts layer of DeepSeek-V3, converted FP8 -> BF16 -> FP8 by the code that converts models.

`tools/bench/convert_layer.py [--experts 256] [--hidden 7168] [--workers 2] [--folder runs/convert_layer] [--keep]`

The layer (256 experts of 2048 x 7168, shared expert, attention: 11.5 B parameters) is generated tensor by tensor, never
whole, and written as an FP8 folder. That is converted to BF16, and this to FP8 again, as `megatron-r1 convert` does.
Every tensor of the two FP8 folders must be the same to the last bit, scales too, and so must be their files. Each step
is a process of its own, whose largest memory is what the kernel says; of its further processes, the largest counts for
each. A folder is removed once the next one is made from it: at most 35 GB are on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_r1.commands.convert import run
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import InitConfig
from megatron_r1.hf.audit import AUDIT_FILE, merge_audits
from megatron_r1.hf.config import hf_config, in_format, write_json
from megatron_r1.hf.conversion import Conversion, convert_files
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.folder import INDEX_FILE
from megatron_r1.hf.fp8_blocks import StoredTensor
from megatron_r1.hf.param_mapping import ParamMapping
from megatron_r1.hf.plan import hf_index, totals
from megatron_r1.hf.publish import publish
from megatron_r1.hf.source import Reader, TensorRead
from megatron_r1.hf.target import FolderTarget
from megatron_r1.hf.workspace import open_workspace

STEPS = ("generated as FP8", "FP8 to BF16", "BF16 to FP8")
LIMIT_GIB = 8
_OFFSETS = 1 << 20


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--width", type=int, default=2048, help="of an expert")
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/convert_layer"))
    parser.add_argument("--keep", action="store_true", help="leave the last folder")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def layer(given: argparse.Namespace) -> ModelConfig:
    """A model of that one layer; of the vocabulary, a block is left."""
    model = load("convert", ["model=v3_671b"]).model
    groups = min(8, given.experts // 2)
    moe = replace(
        model.moe,
        num_experts=given.experts,
        ffn_hidden_size=given.width,
        first_dense_layers=0,
        num_groups=groups,
        group_top_k=min(4, groups),
        top_k=min(8, given.experts // 2),
    )
    return replace(
        model,
        num_layers=1,
        hidden_size=given.hidden,
        num_attention_heads=given.heads,
        vocab_size=128,
        moe=moe,
        mtp=replace(model.mtp, num_layers=0),
    )


@dataclass(frozen=True)
class Generated:
    """A source of bf16 weights that are nowhere stored: windows into normal numbers, each with a scale of its own."""

    model: ModelConfig

    def mappings(self) -> list[ParamMapping]:
        return param_mappings(self.model)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        largest = max(prod(mapping.native_shape) for mapping in param_mappings(self.model))
        numbers = torch.randn(largest + _OFFSETS, generator=torch.Generator().manual_seed(0)).bfloat16()
        yield _Windows(numbers)

    def fingerprint(self) -> Any:
        return ["generated", hf_config(self.model)]


class _Windows:
    def __init__(self, numbers: torch.Tensor):
        self._numbers = numbers

    def read(self, mapping: ParamMapping) -> TensorRead:
        digest = hashlib.sha256(mapping.native.encode()).digest()
        offset, power = int.from_bytes(digest[:4], "little") % _OFFSETS, int.from_bytes(digest[4:6], "little") / 65536
        size = prod(mapping.native_shape)
        tensor = self._numbers[offset : offset + size].view(mapping.native_shape) * (0.02 * 2 ** (8 * power))
        tensor = tensor.float() if mapping.float32 else tensor
        return TensorRead([StoredTensor(part) for part in mapping.split(tensor)], {mapping.native: tensor})


def generate(given: argparse.Namespace, target: Path) -> None:
    """The first folder."""
    conversion = Conversion(Generated(layer(given)), FolderTarget("fp8"), layer(given), int(given.shard_gb * 1e9))
    with open_workspace(target.with_name("hf.tmp"), conversion.settings()) as work:
        records = convert_files(conversion, work, given.workers)
        audit = merge_audits({name: record.pop("audit") for name, record in records.items()})
        write_json(work.files / "config.json", in_format(hf_config(conversion.model), "fp8"))
        if len(files := conversion.files()) > 1:
            write_json(work.files / INDEX_FILE, hf_index(files))
        write_json(work.files / AUDIT_FILE, {"files": records} | audit)
        publish(work.files, target)


def step(given: argparse.Namespace) -> None:
    """One step, in this process."""
    folders = [given.folder / str(number) / "hf" for number in range(len(STEPS))]
    if given.step == 0:
        folders[0].parent.mkdir(parents=True)
        generate(given, folders[0])
    else:
        settings = ConvertConfig(
            dtype=("fp8", "bf16")[given.step % 2], workers=given.workers, max_shard_gb=given.shard_gb
        )
        init = InitConfig(from_=f"hf:{folders[given.step - 1]}")
        run(replace(load("convert"), init=init, root=str(given.folder), name=str(given.step), convert=settings))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if given.workers > 1 else 0
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"own_gib": own / 2**20, "process_gib": children / 2**20}))


def measured(given: argparse.Namespace, number: int) -> dict[str, Any]:
    """Run a step in a process of its own; its seconds, its memory, and the audit of what it wrote."""
    options = [f"--{key}={getattr(given, key)}" for key in ("experts", "hidden", "heads", "width", "workers")]
    options += [f"--shard-gb={given.shard_gb}", f"--folder={given.folder}", f"--step={number}"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    audit = json.loads((given.folder / str(number) / "hf" / AUDIT_FILE).read_text())
    return {"seconds": time.perf_counter() - started, "audit": audit, **json.loads(done.stdout.splitlines()[-1])}


def total_bytes(audit: dict[str, Any]) -> int:
    return sum(file["size"] for file in audit["files"].values())


def differences(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Files and tensors that the two FP8 folders do not have alike."""
    found = []
    for kind in ("files", "written"):
        names = sorted(first[kind].keys() | last[kind].keys())
        found += [f"{kind}: {name}" for name in names if first[kind].get(name) != last[kind].get(name)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    if given.step is not None:
        step(given)
        return 0
    shutil.rmtree(given.folder, ignore_errors=True)
    conversion = Conversion(Generated(layer(given)), FolderTarget("fp8"), layer(given), int(given.shard_gb * 1e9))
    elements = sum(map(prod, _weights(conversion)))
    print(f"{elements / 1e9:.2f} B parameters, {totals(conversion.files()).tensors} tensors, {given.workers} processes")
    results, most = [], 0.0
    for number, title in enumerate(STEPS):
        result = measured(given, number)
        results.append(result)
        memory = result["own_gib"] + given.workers * result["process_gib"]
        most = max(most, memory)
        size, read = total_bytes(result["audit"]), total_bytes(results[number - 1]["audit"]) if number else 0
        rate = (
            f"{read / 1e9:.1f} GB read, {size / 1e9:.1f} GB written, {(read + size) / 1e9 / result['seconds']:.2f} GB/s"
        )
        per = f"{elements / result['seconds'] / 1e6:.0f} M parameters/s"
        print(f"{title:<18} {result['seconds']:>6.1f} s  {rate}, {per}, memory at most {memory:.2f} GiB", flush=True)
        if number:
            shutil.rmtree(given.folder / str(number - 1))
    different = differences(results[0]["audit"], results[-1]["audit"])
    same = (
        f"{len(results[0]['audit']['written'])} tensors and {len(results[0]['audit']['files'])} files bitwise the same"
    )
    print(f"FP8 -> BF16 -> FP8: {same if not different else 'DIFFERENT: ' + '; '.join(different[:5])}")
    if not given.keep:
        shutil.rmtree(given.folder)
    if most > LIMIT_GIB:
        print(f"memory: {most:.2f} GiB, must be below {LIMIT_GIB}")
    return int(bool(different) or most > LIMIT_GIB)


def _weights(conversion: Conversion) -> list[tuple[int, ...]]:
    entries = [entry for file in conversion.files() for entry in file.entries]
    return [entry.shape for entry in entries if not entry.name.endswith("_scale_inv")]


if __name__ == "__main__":
    sys.exit(main())
