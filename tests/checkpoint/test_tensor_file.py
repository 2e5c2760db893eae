"""Files written tensor by tensor are safetensors files, and their digest is that of what is on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_r1.checkpoint.digest import digest_of_file
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


def by_hand(path: Path) -> str:
    """The digest by its definition, from what safetensors reads."""
    raw = path.read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    places = {name: each["data_offsets"] for name, each in json.loads(header[8:]).items() if name != "__metadata__"}
    stored = load_file(path)
    tensors = [stored[name] for name in sorted(places, key=lambda name: places[name]) if stored[name].numel()]
    parts = [header, *(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)]
    return blake3(b"".join(blake3(part).digest() for part in parts)).hexdigest()


def test_record_is_of_what_is_on_disk(tmp_path):
    path = tmp_path / "some.safetensors"
    record = write_tensor_file(path, some_tensors().items())
    assert (record.size, record.digest) == (path.stat().st_size, by_hand(path)) and digest_of_file(path) == by_hand(
        path
    )


def test_hashing_far_behind_writing_and_frequent_syncs_change_nothing(tmp_path, monkeypatch):
    for limit in ("_BEHIND", "_STRIDE"):
        monkeypatch.setattr(f"megatron_r1.checkpoint.tensor_file.{limit}", 1000)
    path, tensors = tmp_path / "large.safetensors", {str(n): torch.arange(n * 100) for n in range(20)}
    record = write_tensor_file(path, tensors.items())
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items())
    assert record.digest == by_hand(path)


def test_a_known_hash_is_taken_as_it_is(tmp_path):
    tensor, entry = torch.arange(9), Entry("one", torch.int64, (9,))
    right = blake3(tensor.numpy().tobytes()).hexdigest()
    found = []
    for number, known in enumerate((None, right, "0" * 64)):
        with TensorFile(tmp_path / f"{number}.safetensors", [entry]) as file:
            file.write("one", tensor, known)
            found.append(file.close().digest)
    assert found[0] == found[1] == by_hand(tmp_path / "0.safetensors") != found[2]


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensor_file(tmp_path / "f.safetensors", [(str(n), torch.zeros(1000)) for n in range(5)])


def test_the_disk_begins_with_each_stride_once(tmp_path, monkeypatch):
    ranges = []
    monkeypatch.setattr("megatron_r1.checkpoint.tensor_file._STRIDE", 1000)
    monkeypatch.setattr("os.posix_fadvise", lambda _, start, length, __: ranges.append((start, start + length)))
    path = tmp_path / "f.safetensors"
    write_tensor_file(path, [(str(n), torch.zeros(n * 100)) for n in range(9)])
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][:-1]
    assert 0 <= path.stat().st_size - ranges[-1][1] < 1000 <= min(end - start for start, end in ranges)


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
