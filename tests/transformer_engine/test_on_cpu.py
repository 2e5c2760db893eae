"""What other tests rely on: a program's ranks have Transformer Engine, and a rank that fails ends the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked_ranks import fork_ranks
from tests.transformer_engine.on_cpu import needs_transformer_engine, run_with_transformer_engine

PROGRAM = """
import json, sys
from pathlib import Path
from megatron_r1.config.load import load
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select

platform = select("cpu")
from megatron_r1.model.build import build_model
from megatron_r1.train.optimizer import Optimizer

config = load("pretrain", ["track=off", "parallel.tensor=2", "model.num_layers=2"])
with process_groups(platform, config.parallel, 0, 1):
    import torch.distributed as dist

    model = build_model(config.model, config.parallel, platform, 0)
    optimizer = Optimizer(model, config.train)
    modules = {type(module).__module__ for module in [*model.modules(), optimizer._parts()[0].optimizer]}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(sorted(modules)))
"""


@needs_transformer_engine
@pytest.mark.dist
def test_ranks_build_the_model_and_the_optimizer_of_transformer_engine(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run_with_transformer_engine(tmp_path / "program.py", tmp_path, ranks=2, seconds=100)
    for rank in (0, 1):
        modules = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        assert {"megatron.core.extensions.transformer_engine", "transformer_engine.pytorch.optimizers.fused_adam"} <= {
            *modules
        }
        assert not any("te_layout_modules" in module for module in modules)


def test_a_rank_that_fails_ends_the_others():
    import os
    import time

    def run() -> None:
        if os.environ["RANK"] == "1":
            raise SystemExit(7)
        time.sleep(60)

    started = time.monotonic()
    assert fork_ranks(2, run) == 7
    assert time.monotonic() - started < 30


def test_the_versions_are_those_that_gpus_get():
    locks = Path(__file__).parents[2] / "launch" / "lock"
    here, gpu = ({*(locks / name).read_text().splitlines()} for name in ("te.txt", "gpu.txt"))
    pinned = {line for line in here if line and line[0] != "#"}
    assert pinned <= gpu and any(line.startswith("transformer-engine==") for line in pinned)
