"""A weight sync beside a raw broadcast and beside files: `tools/bench/sync_speed.py [--servers 2] [--rounds 7]`.

Real SGLang servers on the CPU take a model's weights over gloo (GroupSync: pause, session, buckets, load, cache flush,
version, confirmation), and as many plain processes take the same bytes in pieces of the same size into memory that is
there already, and do nothing with them. The third way is that of a trainer without a sync: transformers' model of the
same weights writes them with `save_pretrained`, in memory, and the servers load the folder. They take turns. Also told:
where a sync's time goes, and how much this process's resident memory grows at most while it first sends, in buckets.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig, MtpConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.rollout import SGLangConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sync.buckets import plan_buckets
from megatron_r1.rollout.sync.group_sender import GroupSender
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.strategies import DiskSync, GroupSync
from tools.bench.comparison import alternate, describe, seconds_of, speed_ratios

MIB = 1 << 20


class TimedSender(GroupSender):
    """A sender that knows where its time went."""

    spent: dict[str, float]

    def _broadcast(self, *given: Any) -> None:
        began = time.perf_counter()
        super()._broadcast(*given)
        self.spent["broadcasting"] += time.perf_counter() - began

    def _wait_loaded(self, *given: Any, **options: Any) -> None:
        began = time.perf_counter()
        super()._wait_loaded(*given, **options)
        self.spent["waiting for servers to load"] += time.perf_counter() - began

    def send(self, *given: Any, **options: Any) -> int:
        self.spent = {"broadcasting": 0.0, "waiting for servers to load": 0.0, "packing and the rest": 0.0}
        began = time.perf_counter()
        sent = super().send(*given, **options)
        self.spent["packing and the rest"] = time.perf_counter() - began - sum(self.spent.values())
        return sent


def model_of(megabytes: int) -> ModelConfig:
    """A DeepSeek model of about so many megabytes in fp32: mostly experts, in matrices of 6 MB (DeepSeek-V3: 29 MB)."""
    return ModelConfig(
        num_layers=4,
        hidden_size=1024,
        num_attention_heads=8,
        ffn_hidden_size=2048,
        vocab_size=4096,
        attention=AttentionConfig(q_lora_rank=256, kv_lora_rank=128),
        moe=MoeConfig(num_experts=max(4, megabytes // 130 * 2), ffn_hidden_size=1536, num_groups=2),
        mtp=MtpConfig(num_layers=0),
    )


def raw_group(store_port: int, rank: int, size: int) -> Any:
    store = dist.TCPStore("127.0.0.1", store_port, size, is_master=False)
    return dist.ProcessGroupGloo(store, rank, size)


def receive(port: int, rank: int, size: int, pieces: list[int], rounds: int) -> None:
    """A plain process: receives the pieces again and again into one buffer."""
    torch.set_num_threads(1)
    group, buffer = raw_group(port, rank, size), torch.zeros(max(pieces), dtype=torch.uint8)
    for _ in range(rounds):
        group.barrier().wait()
        for piece in pieces:
            group.broadcast(buffer[:piece], 0).wait()
        group.barrier().wait()


def raw_seconds(group: Any, buffer: torch.Tensor, pieces: list[int]) -> float:
    group.barrier().wait()
    began = time.perf_counter()
    for piece in pieces:
        group.broadcast(buffer[:piece], 0).wait()
    group.barrier().wait()
    return time.perf_counter() - began


def resident(key: str) -> int:
    """Bytes of this process's memory: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(given: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    from megatron_r1.model.build import build_model, native_tensors

    platform, shape = select("cpu"), model_of(given.megabytes)
    stack.enter_context(process_groups(platform, ParallelConfig(), seed=0, threads=1))
    model = build_model(shape, ParallelConfig(), platform, seed=0)
    train_tokenizer(DataConfig(num_documents=2000)).save(folder / "tokenizer")
    payload, bucket = WeightPayload(shape), given.bucket_mb * MIB
    natives = sorted(name for name, _ in native_tensors(model))
    buckets = plan_buckets(payload.planned_groups(natives), bucket)
    pieces = [sum(entry.nbytes for entry in entries) for entries in buckets]
    size = sum(pieces)
    with DiskSync(lambda: native_tensors(model), shape, folder / "tokenizer") as disk:
        written = disk.write()
        # Transformers converts experts to tensors of its own, and back as it saves.
        peer = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
        config = SGLangConfig(servers=given.servers, max_running_requests=16, max_total_tokens=4096)
        engine = SGLangEngine(written, config, folder / "logs", "cpu", "float32", context_length=64)
        stack.enter_context(engine)
    sender = stack.enter_context(TimedSender(engine.endpoints, "bench"))
    sync = GroupSync(engine, sender, lambda: native_tensors(model), payload, bucket)
    ranks = 1 + given.servers
    store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    for rank in range(1, ranks):
        # Not more than the rounds below: a receiver ends by itself.
        arguments = (store.port, rank, ranks, pieces, given.rounds + 1)
        receiver = context.Process(target=receive, args=arguments, daemon=True)
        receiver.start()
        stack.callback(receiver.kill)
    group, buffer = raw_group(store.port, 0, ranks), torch.ones(max(pieces), dtype=torch.uint8)
    saved = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    versions = count()

    def through_files() -> None:
        peer.save_pretrained(saved)
        engine.load_weights(saved, str(next(versions)))

    forget_peak()
    before = resident("VmRSS")
    sync.push("first")
    grown, by_sync = resident("VmHWM") - before, engine.checksums()
    through_files()
    assert engine.checksums() == by_sync, "the two ways bring different weights"
    spent: dict[str, list[float]] = {}

    def timed_sync() -> float:
        seconds = seconds_of(lambda: sync.push(str(next(versions))))()
        for part, spent_s in {**sender.spent, "session, confirmation": seconds - sum(sender.spent.values())}.items():
            spent.setdefault(part, []).append(spent_s)
        return seconds

    ways = {
        "raw broadcast": lambda: raw_seconds(group, buffer, pieces),
        "sync": timed_sync,
        "save_pretrained + reload": seconds_of(through_files),
    }
    found = alternate(ways, given.rounds)
    print(
        f"{size / 1e6:.1f} MB in {len(pieces)} buckets of at most {max(pieces) / MIB:.0f} MiB, servers: {given.servers}"
    )
    print(describe(found, "raw broadcast", size / 1e9, "GB"))
    ratios = speed_ratios(found, "sync", "save_pretrained + reload")
    print(f"sync: {statistics.median(ratios):.1f} times save_pretrained + reload ({min(ratios):.1f}-{max(ratios):.1f})")
    for part, seconds in spent.items():
        print(f"  {part:<28} {statistics.median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f})")
    print(f"memory grows by {grown / MIB:.1f} MiB, {grown / max(bucket, max(pieces)):.2f} buckets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="of weights, about")
    parser.add_argument("--bucket-mb", type=int, default=128, help="2^20 bytes sent at a time")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        measure(given, Path(folder), stack)


if __name__ == "__main__":
    main()
