"""One update of reward models on two ranks, in the layouts that two ranks can have; tests/train/test_reward_ranks.py.

torchrun ... ranks_reward.py FOLDER writes FOLDER/LAYOUT-OBJECTIVE.json and .pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "dist")]

CASES = (("tp2", "pairwise"), ("tp2", "pointwise"), ("pp2", "pairwise"), ("dp2", "pointwise"))
DEGREES = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}}


def main(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from reward_cases import one_update

    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    platform = select("cpu")
    for layout, objective in CASES:
        parallel = ParallelConfig(**DEGREES[layout])
        with process_groups(platform, parallel, seed=0, threads=1):
            metrics, gradients, scores = one_update(platform, parallel, objective == "pairwise", 0.5)
            if dist.get_rank() == 0:
                found = {"metrics": metrics, "scores": scores}
                (folder / f"{layout}-{objective}.json").write_text(json.dumps(found))
                torch.save(gradients, folder / f"{layout}-{objective}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
