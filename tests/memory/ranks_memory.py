"""Run on every rank of a layout: updates of a model, and how many bytes torch held at each point.

Started by test_memory_model.py under torchrun with a folder that holds job.json, a list of configurations of one number
of ranks; writes one file a rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.live_bytes import LiveBytes


def main(folder: Path) -> None:
    from megatron_r1.config.run import RunConfig
    from megatron_r1.config.schema import convert
    from megatron_r1.platform import select

    platform, found = select("cpu"), {}
    jobs = json.loads((folder / "job.json").read_text())
    from megatron_r1.parallel.mesh import process_groups

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # ranks that join again would find their old addresses in it
    for name, tree in jobs.items():
        config = convert(RunConfig, tree["config"])
        os.environ["MASTER_PORT"] = str(tree["port"])
        with process_groups(platform, config.parallel, seed=0, threads=1):
            found[name] = measured(config, platform)
        print(name, found[name], flush=True)
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def measured(config: Any, platform: Any) -> dict[str, int]:
    """Bytes after an update, and at most during the next one."""
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update

    train, group = config.train, data_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with LiveBytes(()) as live:
        model = build_model(config.model, config.parallel, platform, 0, config.performance)
        optimizer = Optimizer(model, train, config.performance)
        rows = torch.randint(5, config.model.vocab_size, (train.global_batch_size, train.sequence_length + 1))
        mine = rows[rank::ranks].split(train.micro_batch_size)
        shape = train.sequence_length, train.micro_batch_size
        update(model, optimizer, mine, next_token_forward, 1e-3, *shape)
        after, live.most = live.now, live.now
        update(model, optimizer, mine, next_token_forward, 1e-3, *shape)
        return {"updated": after, "peak": live.most}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
