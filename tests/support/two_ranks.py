"""What two gloo ranks find out together; tests/conftest.py starts it once and tests read what each rank wrote.

two_ranks.py FOLDER, which holds the weights of the tiny model (whole.safetensors) and rows.safetensors.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select
from tests.support.fp8_shape import fp8_shape, gradient_squares
from tests.support.layouts import model_of, te_layout

PLATFORM = select("cpu")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from megatron_r1.model.build import build_model, native_tensors  # noqa: E402
from megatron_r1.model.shards import gather_whole  # noqa: E402
from megatron_r1.parallel import comm  # noqa: E402
from megatron_r1.train.ema import MovingAverage  # noqa: E402
from megatron_r1.train.optimizer import Optimizer  # noqa: E402
from megatron_r1.train.stream import next_token_forward  # noqa: E402
from megatron_r1.train.update import update  # noqa: E402
from tests.support.native_weights import load_native_tensors  # noqa: E402

SHARED = ParallelConfig(tensor=2, expert_tensor=2)
GROUPED = ("grouped_bias", "grouped_norm", "grouped_experts")


def main(folder: Path) -> None:
    with process_groups(PLATFORM, SHARED, seed=0, threads=1):
        found: dict[str, Any] = {
            "tensor_parallel": parallel_state.get_tensor_model_parallel_world_size(),
            "threads": torch.get_num_threads(),
            "comm": what_ranks_say(),
            "layouts": {shape: layout(shape) for shape in ("tiny", "direct_query", *GROUPED)},
            "updates": two_updates(folder),
            **{shape: updates_with_grouped_attention(folder, shape) for shape in GROUPED},
            "fp8": two_fp8_updates(),
        }
        rank = dist.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def what_ranks_say() -> dict[str, Any]:
    rank = dist.get_rank()
    return {
        "any": [comm.any_rank(rank == 1), comm.any_rank(False)],
        "all": [comm.all_ranks(rank == 1), comm.all_ranks(True)],
        "broadcast": comm.broadcast({"from": rank}, source=1),
        "gather": comm.all_gather_object(f"rank {rank}"),
        "numbers": [
            comm.sum_over_ranks("test", {"b": 0.1, "a": 1.0 + rank}),
            comm.sum_over_ranks("test", {"c": 2.0} if rank else {}),  # other names, which rank 0 learns
            comm.sum_over_ranks("test", {"c": 3.0} if rank else {}),
            comm.max_over_ranks("test", {"a": float(rank), "b": -0.5}),
        ],
        "nan": str(comm.max_over_ranks("test", {"a": float("nan") if rank else 7.0, "b": float("inf")})),
    }


def layout(shape: str) -> dict[str, Any]:
    """Each parameter's local shape and its shards as a distributed checkpoint would describe them."""
    model = build_model(model_of(shape), SHARED, PLATFORM, seed=0)
    described = model.sharded_state_dict()
    result = {}
    for name, tensor in native_tensors(model):
        entry = described[name]
        shards = [entry] if isinstance(entry, ShardedTensor) else entry.build()
        result[name] = {"shape": list(tensor.shape), "shards": [describe(shard) for shard in shards]}
    return result


def describe(shard: ShardedTensor) -> dict[str, Any]:
    return {
        "key": shard.key,
        "global_shape": list(shard.global_shape),
        "local_shape": list(shard.local_shape),
        "offset": list(shard.global_offset),
        "experts_axis": shard.prepend_axis_num,
        "main": not any(shard.replica_id),
    }


def two_updates(folder: Path) -> dict[str, Any]:
    """Losses, gradient norms and loads of two updates of the tiny model, its weights shared out by the stored list.

    Then the norm of each weight's moving average, on the rank that gathers them.
    """
    model = build_model(model_of("tiny"), SHARED, PLATFORM, seed=0)
    whole, mine = load_file(folder / "whole.safetensors"), {}
    for name, entry in te_layout("tiny").items():
        mine[name] = entry.shard(whole[name], dist.get_rank(), 2)
    load_native_tensors(model, mine)
    return updates(model, load_file(folder / "rows.safetensors")["rows"])


def updates_with_grouped_attention(folder: Path, shape: str) -> dict[str, Any]:
    """The same of a model with grouped attention, whose first weights are those of one rank by themselves."""
    model = build_model(model_of(shape), SHARED, PLATFORM, seed=0)
    return updates(model, load_file(folder / "rows.safetensors")["rows"] % model_of(shape).vocab_size)


def updates(model: Any, rows_BL: torch.Tensor) -> dict[str, Any]:
    optimizer = Optimizer(model, TrainConfig())
    average, results = MovingAverage(model, 0.5), []
    for _ in range(2):
        results.append(update(model, optimizer, rows_BL.split(2), next_token_forward, 1e-3, 32))
        average.update()
    averages = gather_whole(list(average.shards()), torch.device("cpu"))
    return {
        "loads": {layer: load_E.tolist() for layer, load_E in results[-1].passes.expert_load.items()},
        "averages": {name: float(tensor.norm()) for name, tensor in averages},
        "losses": [
            float(torch.stack([entry["train/loss"] for entry in result.passes.logged]).mean()) for result in results
        ],
        "norms": [result.gradient_norm for result in results],
        "mtp_losses": [result.passes.mtp_loss for result in results],
    }


def two_fp8_updates() -> dict[str, Any]:
    """Losses and norms of two updates in FP8, squares of gradients, and which weights' blocks a rank's shard cuts."""
    precision = Fp8Config(enabled="fp8")
    tiny = build_model(model_of("tiny"), SHARED, PLATFORM, seed=0, precision=precision)
    model, fresh = (build_model(fp8_shape(), SHARED, PLATFORM, seed=0, precision=precision) for _ in range(2))
    optimizer = Optimizer(model, TrainConfig())
    rows_BL = torch.randint(0, 512, (4, 129), generator=torch.Generator().manual_seed(3))
    results = [update(model, optimizer, rows_BL.split(2), next_token_forward, 1e-3, 128) for _ in range(2)]
    return {
        "losses": [
            float(torch.stack([entry["train/loss"] for entry in result.passes.logged]).mean()) for result in results
        ],
        "norms": [result.gradient_norm for result in results],
        "squares": gradient_squares(fresh, rows_BL),
        "cut": model.fp8_plan.cut,
        "cut_of_tiny": tiny.fp8_plan.cut,
    }


if __name__ == "__main__":
    signal.alarm(120)  # whatever happens to the launcher, no rank waits for ever
    main(Path(sys.argv[1]))
