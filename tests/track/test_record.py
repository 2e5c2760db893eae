"""The record survives crashes and resumes without a duplicate."""

import math

import numpy as np
import pytest
import torch

from megatron_r1.track.record import Record, read_metrics


def write(path, steps, resume_step=0, **extra):
    record = Record(path, resume_step)
    for step in steps:
        record.append(step, {"loss": 1.0 / step, **extra})
    record.close()


def steps_of(path):
    return [row["step"] for row in read_metrics(path)]


def test_rows_come_back_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    assert read_metrics(path) == [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_row_is_readable_before_the_record_is_closed(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    record.append(1, {"loss": 2.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    record.close()


def test_resume_removes_later_rows_and_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    write(path, range(7, 13), resume_step=6, again=1)
    assert steps_of(path) == list(range(1, 13))
    assert ["again" in row for row in read_metrics(path)] == [False] * 6 + [True] * 6


def test_start_from_zero_is_a_new_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    record = Record(path, 0)
    record.append(0, {"accuracy": 0.1})
    record.close()
    assert steps_of(path) == [0]


@pytest.mark.parametrize("torn", [b'{"step":4,"lo', b'{"step":4,"loss":0.25}', b"\x00\x00\x00", b"\xff\xfe\n"])
def test_torn_last_line_is_repaired(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_bytes(path.read_bytes() + torn)
    assert steps_of(path) == [1, 2, 3]
    write(path, [4, 5], resume_step=10)
    assert steps_of(path) == [1, 2, 3, 4, 5]
    assert path.read_bytes().count(b"\n") == 5
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_steps_must_rise(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    record.append(3, {})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"step={step}"):
            record.append(step, {})
    record.close()


def test_values_of_other_libraries_and_non_finite_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = Record(path)
    record.append(1, {"a": np.float32(0.5), "b": torch.tensor(2.0), "load": torch.tensor([1, 2]), "loss": math.nan})
    with pytest.raises(TypeError, match="object"):
        record.append(2, {"a": object()})
    record.close()
    [row] = read_metrics(path)
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "a": 0.5, "b": 2.0, "load": [1, 2]}
