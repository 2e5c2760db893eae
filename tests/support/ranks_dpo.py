"""One update of direct preference optimization on two ranks, in one layout; tests/preference/test_dpo.py.

On each of two ranks, ranks_dpo.py FOLDER LAYOUT writes FOLDER/found.json and FOLDER/gradients.pt.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

LAYOUTS = {"tp2": {"tensor": 2, "expert_tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}, "ep2": {"expert": 2}}


def main(folder: Path, layout: str) -> None:
    import torch
    import torch.distributed as dist

    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select
    from tests.support.dpo_cases import one_update
    from tests.support.float64 import float64

    platform, parallel = select("cpu"), ParallelConfig(**LAYOUTS[layout])
    with process_groups(platform, parallel, seed=0, threads=1), float64():
        metrics, gradients, margins = one_update(platform, parallel)
        if dist.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps({"metrics": metrics, "margins": margins}))
            torch.save(gradients, folder / "gradients.pt")


if __name__ == "__main__":
    signal.alarm(100)  # whatever happens to the launcher, no rank waits for ever
    main(Path(sys.argv[1]), sys.argv[2])
