"""Build models as single ranks of jobs of any size, on process groups that connect nothing and tensors without memory.

fake_ranks.py FILE: reads jobs from FILE.json, writes what their ranks hold to FILE.found.json. It needs a process of
its own: megatron-core keeps one layout for the whole process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.load import load
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.parallel.mesh import model_parallel_groups
from megatron_r1.platform import Platform, cpu


@contextmanager
def fake_rank(degrees: ParallelConfig, rank: int, ranks: int) -> Iterator[None]:
    """This process as one rank of a job whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with model_parallel_groups(degrees, seed=0):
            yield
    finally:
        dist.destroy_process_group()


def examine(ranks: int, recipe: str, overrides: list[str], verb: str = "pretrain") -> dict[str, Any]:
    """Why a layout is refused, or what the first ranks of some pipeline stages hold."""
    started = time.process_time()
    try:
        config = load(verb, [*overrides, "track=off"], recipe)
        check_layout(config, verb, ranks)
    except ConfigError as error:
        return {"refused": str(error)}
    degrees = config.parallel
    # A rank of 16,384 takes seconds: of the largest jobs the first alone.
    stages = sorted({0, degrees.mtp_rank, degrees.pipeline - 1}) if ranks <= 4096 else [0]
    held = {stage: held_by(config, stage * (ranks // degrees.pipeline), ranks) for stage in stages}
    return {"held": held, "expected": expected_of(config, ranks, stages), "seconds": time.process_time() - started}


def held_by(config: RunConfig, rank: int, ranks: int) -> dict[str, Any]:
    """Layers of a rank's interleaved stages, and the numbers in the weights that it is the first to hold."""
    from megatron_r1.model.build import build_model
    from megatron_r1.model.chunks import chunks
    from megatron_r1.model.shards import shards

    with fake_rank(config.parallel, rank, ranks):
        platform = Platform("meta", "fake", transformer_engine=False)
        model = build_model(config.model, config.parallel, platform, 0, config.performance, config.fp8)
        return {
            "layers": [[layer.layer_number - 1 for layer in part.decoder.layers] for part in chunks(model)],
            "mtp": [part.mtp_process for part in chunks(model)],
            "numbers": sum(shard.tensor.numel() for shard in shards(model) if shard.owned),
        }


def expected_of(config: RunConfig, ranks: int, stages: list[int]) -> dict[int, int]:
    """The same numbers by the rules of the sync plan, which does not ask megatron-core."""
    from megatron_r1.rollout.sync.plan.layout import predicted

    everything, _ = predicted(config.model, config.parallel, ranks)
    numbers = dict.fromkeys((stage * (ranks // config.parallel.pipeline) for stage in stages), 0)
    for _, parts in everything.values():
        for part in parts:
            if part.rank in numbers:
                count = 1
                for size in part.shape:
                    count *= size
                numbers[part.rank] += count
    return dict(zip(stages, numbers.values(), strict=True))


if __name__ == "__main__":
    file = Path(sys.argv[1])
    cpu.prepare()
    jobs = json.loads(file.with_suffix(".json").read_text())
    found = []
    for job in jobs:
        try:
            found.append(examine(**job))
        except Exception as error:
            found.append({"failed": f"{type(error).__name__}: {error}"})
    file.with_suffix(".found.json").write_text(json.dumps(found))
