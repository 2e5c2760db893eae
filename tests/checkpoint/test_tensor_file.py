"""Files written tensor by tensor are safetensors files, and their hash is that of their bytes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, Entry, TensorFile, write_tensor_file


def some_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): (torch.randn(3, 5, generator=draw) * 20).to(dtype) for dtype in TYPE_NAMES if dtype != torch.bool
    }
    return tensors | {
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(7.0),
        "nothing": torch.empty(0, 4),
        "transposed": torch.randn(4, 6, generator=draw).T,
    }


def test_safetensors_reads_back_every_type_and_shape(tmp_path):
    tensors = some_tensors()
    write_tensor_file(tmp_path / "some.safetensors", tensors.items(), {"what": "these"})
    found = load_file(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    with safe_open(tmp_path / "some.safetensors", "pt") as file:
        assert file.metadata() == {"what": "these"}


def test_record_is_of_the_bytes_on_disk(tmp_path):
    path = tmp_path / "some.safetensors"
    record = write_tensor_file(path, some_tensors().items())
    assert (record.size, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_tensor_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_r1.checkpoint.tensor_file._CHUNK", 64)
    whole = torch.arange(1000)
    record = write_tensor_file(tmp_path / "large.safetensors", [("whole", whole)])
    assert torch.equal(load_file(tmp_path / "large.safetensors")["whole"], whole)
    assert record.sha256 == hashlib.sha256((tmp_path / "large.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name, tensor", [("other", torch.zeros(2)), ("one", torch.zeros(3)), ("one", torch.zeros(2, dtype=torch.int64))]
)
def test_what_was_not_announced_is_refused(tmp_path, name, tensor):
    one = [Entry("one", torch.float32, (2,))]
    with TensorFile(tmp_path / "f.safetensors", one) as file, pytest.raises(ValueError, match="must be Entry"):
        file.write(name, tensor)


def test_unwritten_and_doubled_tensors_are_refused(tmp_path):
    one, unwritten = [Entry("one", torch.float32, (2,))], "one was never written"
    with TensorFile(tmp_path / "f.safetensors", one) as file, pytest.raises(ValueError, match=unwritten):
        file.close()
    with pytest.raises(ValueError, match="announced twice"):
        TensorFile(tmp_path / "g.safetensors", one * 2)
