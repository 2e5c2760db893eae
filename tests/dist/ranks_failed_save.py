"""Run on two data-parallel ranks: a save that the rank with the parts cannot write, then one that works.

Started by test_failed_save.py with a folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist


def main(folder: Path) -> None:
    from megatron_r1.config.load import load
    from megatron_r1.platform import select

    select("cpu")
    from megatron_r1.checkpoint.store import SaveFailed
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
    from megatron_r1.runs.training_run import training_run

    config = load("pretrain", [f"root='{folder}'", "platform=cpu", "threads=1", "data.num_documents=2000"])
    with training_run(config, train_tokenizer(config.data), None) as run:
        found = {}
        for step, broken_rank in ((1, 0), (2, None)):
            snapshot, broken = run.snapshot(run.state, dict, tuple), dist.get_rank() == broken_rank
            try:
                run.store.commit(step, lambda to, t=snapshot, b=broken: t.write(to / "absent" if b else to), {})
                found[step] = "saved"
            except SaveFailed as error:
                found[step] = str(error)
        (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
