"""On every rank, for test_optimizer.py: what tests/dist/ranks_resharding.py saves and loads, in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_r1.config.run import RunConfig
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select
from tests.dist.ranks_resharding import load, save


def main(folder: Path, sources: list[str]) -> None:
    config, platform = RunConfig(), select("cpu")
    with process_groups(platform, config.parallel, seed=0, threads=1):
        saved = save(config, platform, folder)
        dist.barrier()
        found = {"saved": saved, "loaded": load(config, platform, folder.parent, sources)}
        if dist.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps(found))


main(Path(sys.argv[1]), sys.argv[2:])
