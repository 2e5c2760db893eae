"""The order of passes is that in which megatron-core's own schedules run them, on gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.load import load, resolved
from megatron_r1.plan.pipeline.orders import ScheduleShape, build_schedule
from megatron_r1.platform.ports import reserve_ports
from tests.support.fork_server import run_forked_to_the_end

RANKS = 4
SHAPES = {
    "1f1b-2": ScheduleShape("1f1b", 2, 5),
    "1f1b-4": ScheduleShape("1f1b", 4, 8),
    "interleaved-2": ScheduleShape("interleaved", 2, 6, 2),
    "interleaved-2-groups-of-3": ScheduleShape("interleaved", 2, 8, 2, group=3),
    "interleaved-4": ScheduleShape("interleaved", 4, 8, 2),
}
"""Pipelines of 2 ranks run twice beside each other."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list]]:
    """Name -> pipeline rank -> its passes."""
    folder = tmp_path_factory.mktemp("order")
    jobs = {}
    for (name, shape), port in zip(SHAPES.items(), reserve_ports(len(SHAPES)), strict=True):
        overrides = [f"parallel.pipeline={shape.pipeline}", f"parallel.virtual_pipeline={shape.virtual_pipeline}"]
        overrides += [f"parallel.microbatch_group_size_per_vp_stage={shape.group}"]
        config = load("pretrain", ["model=tiny", "model.num_layers=8", "train.sequence_length=8", *overrides])
        jobs[name] = {"config": resolved(config), "port": port, "micro_batches": shape.micro_batches}
    (folder / "job.json").write_text(json.dumps(jobs))
    run_forked_to_the_end(Path(__file__).with_name("ranks_order.py"), folder, ranks=RANKS, seconds=420)
    found: dict[str, dict[int, list]] = {name: {} for name in SHAPES}
    for number in range(RANKS):
        for name, result in json.loads((folder / f"{number}.json").read_text()).items():
            order = [tuple(entry) for entry in result["order"]]
            assert found[name].setdefault(result["rank"], order) == order
    return found


@pytest.mark.dist
@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", SHAPES)
def test_passes_run_in_the_order_that_is_simulated(name, measured):
    schedule = build_schedule(SHAPES[name])
    expected = [[(each.kind, each.micro_batch, each.chunk) for each in passes] for passes in schedule.order]
    assert [measured[name][rank] for rank in range(schedule.ranks)] == expected
