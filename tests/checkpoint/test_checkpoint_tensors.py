"""Named tensors and plain values come back as they were."""

from __future__ import annotations

import torch

from megatron_r1.checkpoint.tensors import read_state, read_tensors, write_state, write_tensors


def test_tensors_come_back_bitwise(tmp_path):
    buffer = torch.randn(12, generator=torch.Generator().manual_seed(0))
    tensors = {
        "first": buffer[:6].view(2, 3),
        "second, of the same buffer": buffer[6:].view(3, 2).t(),
        "step": torch.tensor(7.0),
        "bytes": torch.get_rng_state(),
        "half": buffer.to(torch.bfloat16),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "trained": torch.nn.Parameter(buffer.clone()),
    }
    write_tensors(tmp_path, "model", 0, tensors.items())
    found = read_tensors(tmp_path, "model", 0)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].numpy(force=True).tobytes() == tensor.detach().contiguous().numpy(force=True).tobytes() \
            if tensor.dtype != torch.bfloat16 else torch.equal(found[name], tensor)  # fmt: skip


def test_ranks_and_kinds_have_files_of_their_own(tmp_path):
    for kind in ("model", "optimizer"):
        for rank in (0, 1):
            write_tensors(tmp_path, kind, rank, [("x", torch.full((2,), float(rank)))])
    assert len(list(tmp_path.iterdir())) == 4
    assert read_tensors(tmp_path, "optimizer", 1)["x"].tolist() == [1.0, 1.0]


def test_nothing_is_a_file_too(tmp_path):
    write_tensors(tmp_path, "optimizer", 0, [])
    assert read_tensors(tmp_path, "optimizer", 0) == {}


def test_plain_values_come_back(tmp_path):
    state = {"step": 3, "consumed_tokens": 2**40}
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
