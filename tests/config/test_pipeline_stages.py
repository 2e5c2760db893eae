"""What each pipeline stage holds, and how many micro-batches an interleaved stage passes at a time."""

from __future__ import annotations

import pytest

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline_stages import divide_layers, fitting_group_size, mtp_stage, parse_layout


@pytest.mark.parametrize(
    ("num_layers", "mtp_layers", "stages", "expected"),
    [
        (4, 1, 2, [2, 2]),
        (61, 1, 16, [4] * 15 + [1]),
        (61, 0, 16, [4] * 14 + [3, 2]),
        (61, 1, 32, [2] * 30 + [1, 0]),
        (61, 1, 8, [8] * 7 + [5]),
        (27, 0, 8, [4] * 4 + [3] * 3 + [2]),
        (5, 0, 6, [1] * 5 + [0]),
        (4, 1, 6, None),
    ],
)
def test_layers_are_divided_and_the_last_stage_has_what_its_other_work_leaves(num_layers, mtp_layers, stages, expected):
    assert divide_layers(num_layers, mtp_layers, stages) == expected


def test_a_layout_is_read_as_megatron_lm_writes_it():
    stages = parse_layout("Et*3|(tt|)*29,m|L", 32)
    assert [stage.layers for stage in stages] == [3] + [2] * 29 + [0, 0]
    assert (mtp_stage(stages), stages[0].embedding, stages[31].loss, stages[31].words()) == (30, True, True, ["loss"])
    degrees = ParallelConfig(pipeline=16, virtual_pipeline=2, pipeline_layout="Et*3|(tt|)*29,m|L")
    assert degrees.mtp_rank == 14 and degrees.stages_of(61, 1) == stages
    assert degrees.stages_of(61, 0)[30].words() == []  # a second model without multi-token layers
    assert ParallelConfig(pipeline=16).mtp_rank == 15


@pytest.mark.parametrize(
    ("preferred", "pipeline", "passes", "expected"),
    [
        (16, 16, 120, 20),  # DeepSeek-V3: 15,360 sequences on 128 data-parallel ranks; 16 would leave 8
        (16, 16, 24, 24),
        (16, 16, 33, 17),
        (8, 8, 480, 8),
        (5, 2, 13, 5),
        (5, 2, 11, 3),  # 5 leaves 1
        (4, 4, 3, None),
    ],
)
def test_a_group_is_the_preferred_or_the_smallest_that_megatron_core_schedules(preferred, pipeline, passes, expected):
    assert fitting_group_size(preferred, pipeline, passes) == expected
