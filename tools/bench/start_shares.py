"""What one rank hashes, reads and holds while a run of a big model starts from a checkpoint, and while it resumes.

    tools/bench/start_shares.py --ranks 8 model=moonlight_16b parallel.expert=8

The checkpoint has the files of so many ranks, in their sizes and with their true digests, but they are holes of zeros:
no disk and no memory is needed for them. One process plays rank 0 (or --rank); what it reads, the kernel counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from megatron_r1.checkpoint.digest import digest_of_parts
from megatron_r1.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest
from megatron_r1.checkpoint.sharded import INDEX, WholeTensors
from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, Entry
from megatron_r1.checkpoint.tensors import tensor_path
from megatron_r1.config.load import load, resolved
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.model.shards import ShardLocation
from megatron_r1.rollout.sync.plan.layout import predicted
from megatron_r1.runs.initial_weights import find_initial_model

GB = 1e9
KINDS = {"model": None, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
"""Kind of tensors -> their type; None is the weights' own."""
Part = tuple[str, tuple[int, ...], ShardLocation]


class Rank:
    """One rank of many, which sees its own words alone."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


@cache
def zeros(size: int) -> bytes:
    """BLAKE3 of so many zeros."""
    found, block = blake3(), bytes(1 << 22)
    for start in range(0, size, len(block)):
        found.update(block[: size - start])
    return found.digest()


def write_holes(path: Path, parts: list[Part], dtype: torch.dtype | None) -> FileRecord:
    """A file of these parts, all zeros; returns its size and digest."""
    entries = [Entry(str(number), dtype or place.dtype, place.shape) for number, (_, _, place) in enumerate(parts)]
    index = [[name, shape, [each.start for each in place.index]] for name, shape, place in parts]
    header: dict[str, Any] = {"__metadata__": {INDEX: json.dumps(index)}}
    end = 0
    for entry in entries:
        offsets = [end, end := end + entry.nbytes]
        header[entry.name] = {"dtype": TYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    path.write_bytes(start)
    os.truncate(path, len(start) + end)
    digest = digest_of_parts([blake3(start).digest(), *(zeros(entry.nbytes) for entry in entries)])
    return FileRecord(len(start) + end, digest)


def write_checkpoint(folder: Path, model: ModelConfig, parallel: ParallelConfig, ranks: int) -> list[list[Part]]:
    """The checkpoint of step 1; returns each rank's parts of every kind."""
    everything, _ = predicted(model, parallel, ranks)
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    for name, (shape, places) in everything.items():
        for place in places:
            parts[place.rank].append((name, tuple(shape), place))
    checkpoint, files = folder / "checkpoints" / "step-00000001", {}
    checkpoint.mkdir(parents=True)
    for kind, dtype in KINDS.items():
        for rank in filter(parts.__getitem__, range(ranks)):
            path = tensor_path(checkpoint, kind, rank)
            files[path.name] = write_holes(path, parts[rank], dtype)
    manifest = Manifest(dict(sorted(files.items())), {"config": {"model": resolved(model)}})
    (checkpoint / MANIFEST_NAME).write_bytes(manifest.encode())
    return parts


def read_own(folder: Path, kinds: list[str], own: list[Part]) -> Iterator[int]:
    """Reads a rank's parts one at a time; gives the bytes of each."""
    for kind in kinds:
        with WholeTensors(folder, kind) as tensors:
            for name, shape, place in own:
                offset = tuple(each.start for each in place.index)
                yield tensors.part(name, shape, offset, place.shape).clone().nbytes


def bytes_read() -> int:
    """Bytes that this process has read by calls; what it reads by mapped files is not counted."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def measured(title: str, verify: Callable[[], Path], kinds: list[str], own: list[Part]) -> str:
    """A line on what verifying and reading took."""
    before, began = bytes_read(), time.perf_counter()
    folder = verify()
    hashed, seconds = bytes_read() - before, time.perf_counter() - began
    sizes = list(read_own(folder, kinds, own))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"{title:<26} hashed {hashed / GB:8.3f} GB ({seconds:.1f} s), read {sum(sizes) / GB:8.3f} GB, "
        f"at most {max(sizes) / GB:.3f} GB at a time; peak of the process {peak / GB:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of pretrain: model and parallel")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=0, help="the rank that is measured")
    given = parser.parse_args()
    config = load("pretrain", given.overrides)
    with tempfile.TemporaryDirectory() as name:
        folder, rank = Path(name), Rank(given.rank, given.ranks)
        own = write_checkpoint(folder, config.model, config.parallel, given.ranks)[given.rank]
        files = list((folder / "checkpoints").glob("*/*.safetensors"))
        whole = sum(path.stat().st_size for path in files)
        count = sum(prod(mapping.shape) for _, _, mapping in own)
        print(f"{' '.join(given.overrides)} on {given.ranks} ranks: {len(files)} files of {whole / GB:.1f} GB in all; "
              f"rank {given.rank} owns {count / 1e6:.0f} M numbers")  # fmt: skip

        def initial() -> Path:
            return find_initial_model(str(folder)).weights(rank).folder

        def resumed() -> Path:
            with CheckpointStore(folder / "checkpoints", ranks=rank) as store:
                found = store.newest_verified()
            assert found
            return found[0]

        print(measured("started from it", initial, ["model"], own))
        print(measured("resumed", resumed, list(KINDS), own))


if __name__ == "__main__":
    main()
