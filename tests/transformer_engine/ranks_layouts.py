"""Layouts that four ranks compute one after the other, with Transformer Engine or with torch's parts.

python [-m tests.transformer_engine] ranks_layouts.py FOLDER CASE ... writes FOLDER/CASE.pt: losses and whole gradients
of an update on rows of tokens and of one on packed sequences. The case `stored` writes what each rank
holds of the stored list's models: FOLDER/layouts-RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.forked_ranks import fork_ranks, meet_elsewhere

RANKS, SEQUENCES, LENGTH = 4, 8, 32
SMALL = ("track=off", "model.num_layers=2")
TENSOR, PIPELINE, EXPERT = (f"parallel.{name}=2" for name in ("tensor", "pipeline", "expert"))
INTERLEAVED = (PIPELINE, "parallel.virtual_pipeline=2", "model.num_layers=4")
SHARED_EXPERTS = "performance.moe_shared_expert_overlap=true"
RECOMPUTED = "performance.recompute_modules=[layernorm,mla_up_proj,moe_act]"
V2 = (
    "model.moe.score_function=softmax", "model.moe.num_groups=1", "model.moe.group_top_k=1",
    "model.attention.q_lora_rank=0", "model.rope.factor=1.0", "model.mtp.num_layers=0",
)  # fmt: skip
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp4": (),
    "dp4-recomputed": (RECOMPUTED,),
    "dp4-overlapped": ("performance.overlap_grad_reduce=true",),
    "dp4-v2": V2,
    "tp2": (TENSOR,),
    "tp2-etp2": (TENSOR, "parallel.expert_tensor=2"),
    "tp2-ep2": (TENSOR, EXPERT),
    "tp2-pp2": (TENSOR, PIPELINE),
    "pp2-vpp2": INTERLEAVED,
    "pp2-ep2": (PIPELINE, EXPERT),
    "ep4": ("parallel.expert=4",),
    "ep2-recomputed": (EXPERT, RECOMPUTED),
    "ep2-gathered": (EXPERT, "performance.moe_token_dispatcher_type=allgather"),
    "ep2-shared": (EXPERT, SHARED_EXPERTS),
    "tp2-ep2-shared": (TENSOR, EXPERT, SHARED_EXPERTS),
    "qwen2-tp2": ("model=tiny_dense", TENSOR),
    "qwen3-moe-tp2-ep2": ("model=tiny_qwen3_moe", TENSOR, EXPERT),
}
BF16 = ("model.dtype=bf16", EXPERT)
OVERLAPPED = "performance.overlap_moe_expert_parallel_comm=true"
DEEPSEEK = ("performance=deepseek", "performance.moe_token_dispatcher_type=alltoall")
OVERLAPS: dict[str, tuple[str, ...]] = {
    "ep2-plain": BF16,
    "ep2-overlapped": (*BF16, OVERLAPPED),
    "ep2-delayed": (*BF16, OVERLAPPED, "performance.delay_wgrad_compute=true"),
    "ep2-deepseek": (*BF16, *DEEPSEEK),
    "pp2-vpp2-ep2-plain": (*BF16, *INTERLEAVED),
    "pp2-vpp2-ep2-overlapped": (*BF16, *INTERLEAVED, OVERLAPPED),
    "pp2-vpp2-ep2-deepseek": (*BF16, *INTERLEAVED, *DEEPSEEK),
}
"""In bf16, which megatron-core asks of them; each is one of the plain ones otherwise."""
STORED = ("tiny", "direct_query", "grouped_bias", "grouped_norm", "grouped_experts")


def main(folder: Path, names: list[str]) -> int:
    from megatron_r1.config.load import load
    from megatron_r1.platform import select

    platform = select("cpu")
    cases = {name: (*SMALL, *overrides) for name, overrides in {**LAYOUTS, **OVERLAPS}.items() if name in names}
    configs = {name: load("pretrain", overrides) for name, overrides in cases.items()}

    def rank() -> None:
        for name, config in configs.items():
            compute(name, config, platform, folder)
        if "stored" in names:
            describe(platform, folder)

    return fork_ranks(RANKS, rank)


def compute(name: str, config: Any, platform: Any, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.train.optimizer import Optimizer
    from tests.dist.ranks_layouts import build

    config.train.optimizer.max_grad_norm = 0.0
    with process_groups(platform, config.parallel, seed=0, threads=1):
        meet_elsewhere()
        model = build(config, platform)
        optimizer = Optimizer(model, config.train, config.performance)
        kinds = {"plain": rows, "packed": examples} if name in LAYOUTS else {"plain": rows, "documents": documents}
        found = {kind: one_update(config, platform, model, optimizer, kinds[kind]) for kind in kinds}
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


def one_update(config: Any, platform: Any, model: Any, optimizer: Any, batch_of: Any) -> dict[str, Any]:
    """Loss and whole gradients of an update that moves no weight."""
    import torch.distributed as dist

    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.update import update
    from tests.dist.ranks_layouts import whole_gradients

    group = data_parallel_group()
    reader, batch, size = batch_of(config, platform.device)
    mine = reader.micro_batches(batch, dist.get_rank(group), dist.get_world_size(group), size)
    shape = reader.shape(LENGTH, size) if hasattr(reader, "shape") else (LENGTH, size)
    result = update(model, optimizer, mine, reader.forward, 0.0, *shape)
    return {"loss": logged_metrics(result)["train/loss"], "gradients": whole_gradients(model, optimizer)}


def rows(config: Any, device: str) -> tuple[Any, Any, int]:
    """Sequences of random tokens: reader, batch, sequences of a micro-batch."""
    import numpy as np

    from megatron_r1.train.stream import StreamReader

    return StreamReader(device), np.random.default_rng(1).integers(5, 512, (SEQUENCES, LENGTH + 1)), 1


def examples(config: Any, device: str) -> tuple[Any, Any, int]:
    """Conversations end to end, which do not see each other."""
    from megatron_r1.sft.supervised import SupervisedReader
    from tests.support.packing_cases import chat_batch

    return SupervisedReader(True, config.model.mtp.num_layers, device), chat_batch(SEQUENCES, LENGTH), 1


def documents(config: Any, device: str) -> tuple[Any, Any, int]:
    """Documents with unlike numbers of targets, so that micro-batches have unlike weights."""
    from megatron_r1.train.packed import PackedReader
    from tests.support.packing_cases import packed_batch

    return PackedReader(True, config.model.mtp.num_layers, device), packed_batch(SEQUENCES, LENGTH), 1


def describe(platform: Any, folder: Path) -> None:
    """Shapes and shards of the stored list's models on two tensor-parallel ranks, each twice."""
    import torch.distributed as dist

    from megatron_r1.parallel.mesh import process_groups
    from tests.support.two_ranks import SHARED, layout

    with process_groups(platform, SHARED, seed=0, threads=1):
        found = {shape: layout(shape) for shape in STORED}
        (folder / f"layouts-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
