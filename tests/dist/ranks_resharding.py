"""Run on every rank: with each layout of this many ranks train and save, then go on from what every layout has saved.

Started by test_resharding.py: ranks_resharding.py FOLDER save|load. FOLDER/job.json has the
layouts of each number of ranks, and the layouts whose checkpoints are to be read. The layouts follow one another in the
same processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.routing import forget_routing

STEPS = 3


def main(folder: Path, action: str) -> None:
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.config.run import RunConfig
    from megatron_r1.platform import select

    platform = select("cpu")
    from megatron_r1.parallel.mesh import model_parallel_groups

    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group(platform.backend)
    for name, degrees in job["layouts"][str(dist.get_world_size())].items():
        config = RunConfig(parallel=ParallelConfig(**degrees))
        with model_parallel_groups(config.parallel, seed=0):
            own = folder / name
            own.mkdir(exist_ok=True)
            found = save(config, platform, own) if action == "save" else load(config, platform, folder, job["sources"])
            if dist.get_rank() == 0:
                (own / f"{action}.json").write_text(json.dumps(found))
        forget_routing()
    dist.destroy_process_group()


def build(config: Any, platform: Any, seed: int) -> tuple[Any, Any]:
    from megatron_r1.model.build import build_model
    from megatron_r1.train.optimizer import Optimizer

    model = build_model(config.model, config.parallel, platform, seed)
    return model, Optimizer(model, config.train)


def step(model: Any, optimizer: Any, number: int) -> float:
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update

    group = data_parallel_group()
    rows = torch.randint(5, 512, (8, 33), generator=torch.Generator().manual_seed(number))
    mine = rows[dist.get_rank(group) :: dist.get_world_size(group)]
    return logged_metrics(update(model, optimizer, mine.split(2), next_token_forward, 1e-3, 32, micro_batch_size=2))[
        "train/loss"
    ]


def save(config: Any, platform: Any, folder: Path) -> dict[str, Any]:
    """Train a little and save; then the loss that comes next."""
    from megatron_r1.checkpoint.sharded import TensorPart, write_parts
    from megatron_r1.model.shards import shards
    from megatron_r1.train.optimizer_state import OptimizerState

    model, optimizer = build(config, platform, seed=0)
    for number in range(STEPS):
        step(model, optimizer, number)
    kinds: dict[str, list[TensorPart]] = {}
    states = [("model", shard) for shard in shards(model) if shard.owned]
    for kind, shard in (*states, *OptimizerState(model, optimizer).shards()):
        part = TensorPart(shard.name, shard.whole_shape, shard.offset, shard.tensor.clone())
        kinds.setdefault(kind, []).append(part)
    for kind, parts in kinds.items():
        write_parts(folder, kind, dist.get_rank(), parts)
    return {"next_loss": step(model, optimizer, STEPS)}


def load(config: Any, platform: Any, root: Path, sources: list[str]) -> dict[str, Any]:
    """Of every layout's checkpoint: the loss that comes next, and whether the state is what was read."""
    from megatron_r1.checkpoint.sharded import WholeTensors
    from megatron_r1.model.shards import shards
    from megatron_r1.train.optimizer import MOMENTS
    from megatron_r1.train.optimizer_state import OptimizerState

    found = {}
    for source in sources:
        model, optimizer = build(config, platform, seed=1)
        tensors = {kind: WholeTensors(root / source, kind) for kind in ("model", *MOMENTS)}

        def read(kind: str, shard: Any, tensors: dict = tensors) -> torch.Tensor:
            return tensors[kind].part(shard.name, shard.whole_shape, shard.offset, tuple(shard.tensor.shape))

        for shard in shards(model):
            shard.tensor.copy_(read("model", shard))
        OptimizerState(model, optimizer).load(read, STEPS)
        # All of them, since the state is gathered from all ranks: one that stopped at a difference would be waited for.
        equal = [
            torch.equal(shard.tensor, read(kind, shard)) for kind, shard in OptimizerState(model, optimizer).shards()
        ]
        found[source] = {"equal": all(equal), "next_loss": step(model, optimizer, STEPS)}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
