"""Where a run stood is read back only if this version wrote it."""

from __future__ import annotations

import pytest

from megatron_r1.checkpoint.tensors import write_state
from megatron_r1.errors import DataError
from megatron_r1.train.state import TrainState

GOOD = TrainState(step=3, updates=5).as_dict()


@pytest.mark.parametrize("change", [{"steps": 3}, {"step": "3"}, {"step": True}, {"step": 1.5}])
def test_a_state_of_another_program_is_refused(tmp_path, one_rank, change):
    from megatron_r1.runs.resume import read_train_state

    write_state(tmp_path, GOOD)
    assert read_train_state(tmp_path) == TrainState(step=3, updates=5)
    write_state(tmp_path, GOOD | change)
    with pytest.raises(DataError, match="its state is not one of this version"):
        read_train_state(tmp_path)
