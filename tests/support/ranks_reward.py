"""One update of a reward model of each kind on two ranks, in one layout; tests/preference/test_reward_ranks.py.

torchrun ... ranks_reward.py FOLDER LAYOUT writes FOLDER/OBJECTIVE.json and .pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}, "ep2": {"expert": 2}}


def main(folder: Path, layout: str) -> None:
    import torch
    import torch.distributed as dist

    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select
    from tests.support.reward_cases import one_update

    platform, parallel = select("cpu"), ParallelConfig(**LAYOUTS[layout])
    with process_groups(platform, parallel, seed=0, threads=1):
        for objective in ("pairwise", "pointwise"):
            metrics, gradients, scores = one_update(platform, parallel, objective == "pairwise", 0.5)
            if dist.get_rank() == 0:
                (folder / f"{objective}.json").write_text(json.dumps({"metrics": metrics, "scores": scores}))
                torch.save(gradients, folder / f"{objective}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
