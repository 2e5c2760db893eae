"""Parts that ranks write, and any box of the whole that another layout reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_r1.checkpoint.sharded import TensorPart, WholeTensors, write_parts
from megatron_r1.errors import DataError

WHOLE = torch.arange(24.0).reshape(4, 6)
COUNT = torch.tensor(7.0)


def part(rows: slice, columns: slice) -> TensorPart:
    return TensorPart("weight", (4, 6), (rows.start, columns.start), WHOLE[rows, columns])


QUARTERS = [part(slice(r, r + 2), slice(c, c + 3)) for r in (0, 2) for c in (0, 3)]


def write(folder: Path, *parts_of_ranks: list[TensorPart]) -> WholeTensors:
    for rank, parts in enumerate(parts_of_ranks):
        write_parts(folder, "model", rank, parts)
    return WholeTensors(folder, "model")


def test_any_box_comes_back_whoever_wrote_it(tmp_path):
    found = write(tmp_path, QUARTERS[:1], QUARTERS[1:], [TensorPart("count", (), (), COUNT)])
    assert set(found) == {"weight", "count"} and torch.equal(found["count"], COUNT)
    for top in range(4):
        for left in range(6):
            for height in range(1, 5 - top):
                for width in range(1, 7 - left):
                    box = found.part("weight", (4, 6), (top, left), (height, width))
                    assert torch.equal(box, WHOLE[top : top + height, left : left + width])


def test_bits_and_types_come_back(tmp_path):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    found = write(tmp_path, [TensorPart("odd", (4,), (0,), odd), TensorPart("half", (4,), (0,), odd.bfloat16())])
    assert torch.equal(found["odd"].view(torch.int32), odd.view(torch.int32))
    assert found["half"].dtype == torch.bfloat16


def test_a_rank_without_parts_writes_no_file(tmp_path):
    write(tmp_path, QUARTERS, [])
    assert [path.name for path in tmp_path.iterdir()] == ["model-00000.safetensors"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (QUARTERS[:3], "6 of 24 numbers are missing"),
        # As many numbers as there should be: one quarter twice, one not at all.
        ([*QUARTERS[:3], QUARTERS[0]], "some of its numbers are twice"),
    ],
    ids=["a part is missing", "a part is there twice and another missing"],
)
def test_a_tensor_that_is_not_whole_is_refused(tmp_path, parts, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path, parts)["weight"]


def test_what_is_not_there_or_has_another_shape_is_refused(tmp_path):
    found = write(tmp_path, QUARTERS)
    with pytest.raises(DataError, match="bias: missing"):
        found.part("bias", (4,), (0,), (4,))
    with pytest.raises(DataError, match="must have"):
        found.part("weight", (6, 4), (0, 0), (6, 4))


def test_ranks_that_disagree_about_a_shape_are_refused(tmp_path):
    with pytest.raises(DataError, match="elsewhere"):
        write(tmp_path, QUARTERS[:2], [TensorPart("weight", (4, 7), (2, 0), WHOLE[2:])])


def test_a_file_of_another_program_is_refused(tmp_path):
    save_file({"weight": WHOLE}, tmp_path / "model-00000.safetensors")
    with pytest.raises(DataError, match="has no list of the parts"):
        WholeTensors(tmp_path, "model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([["weight", [4, 6], [1, 0]]], "a part of weight exceeds the whole tensor"),
        ([["weight", [4, 6], [-1, 0]]], "a part of weight exceeds the whole tensor"),
        ([["weight", [4, 6], [0]]], "a part of weight exceeds the whole tensor"),
        ([["weight", [4, 6], [0, 0]], ["bias", [6], [0]]], "contains other parts than it lists"),
        ([], "contains other parts than it lists"),
    ],
)
def test_an_index_that_does_not_fit_the_file_is_refused(tmp_path, index, message):
    save_file({"0": WHOLE}, tmp_path / "model-00000.safetensors", {"parts": json.dumps(index)})
    with pytest.raises(DataError, match=message):
        WholeTensors(tmp_path, "model")
