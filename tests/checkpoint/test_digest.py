"""Digests of files: of their bytes, or of header and tensors; every bit counts, by any number of threads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from megatron_r1.checkpoint import digest as module
from megatron_r1.checkpoint.digest import Span, digest_of_file, digests, spans_of


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_file({f"{n}": torch.randn(n * 40, generator=draw) for n in range(6)}, path, {"format": "pt"})
    return path


def test_a_file_counts_as_bytes_unless_it_has_tensors(tensors: Path, tmp_path: Path) -> None:
    other = tmp_path / "a.bin"
    other.write_bytes(tensors.read_bytes())
    assert digest_of_file(other) == blake3(other.read_bytes()).hexdigest() != digest_of_file(tensors)
    assert len(spans_of(tensors)) == 1 + 5  # one tensor is empty
    assert [span.start for span in spans_of(tensors)][1:] == [span.end for span in spans_of(tensors)][:-1]


def test_threads_and_pieces_change_nothing(tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "large").write_bytes(random.Random(0).randbytes(300_000))
    paths = [tensors, tmp_path / "empty", tmp_path / "large", tensors]
    whole = list(digests(paths, 1))
    assert whole[0] == whole[3] and whole[1] == blake3(b"").hexdigest()
    monkeypatch.setattr(module, "_JOB", 1)
    monkeypatch.setattr(module, "_BUFFER", 7_001)
    assert list(digests(paths, 5)) == whole and list(digests([])) == []


def test_every_flipped_bit_of_a_tensor_file_changes_its_digest(tensors: Path) -> None:
    whole, right = tensors.read_bytes(), digest_of_file(tensors)
    generator = random.Random(20260101)
    length = 8 + int.from_bytes(whole[:8], "little")
    for number in range(600):  # half of them in the header
        position = generator.randrange(length if number % 2 else len(whole))
        flipped = bytes([whole[position] ^ 1 << generator.randrange(8)])
        tensors.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        assert digest_of_file(tensors) != right, position
    tensors.write_bytes(whole)
    assert digest_of_file(tensors) == right


def with_header(header: object, content: bytes = b"x" * 16) -> bytes:
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(raw).to_bytes(8, "little") + raw + content


def entry(start: object, end: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [16], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (1 << 62).to_bytes(8, "little") + b"{}",
        with_header(b"{"),
        with_header(b"[" * 100_000),
        with_header([]),
        with_header({"a": 1}),
        with_header({"a": {"data_offsets": 5}}),
        with_header({"a": entry("x", 16)}),
        with_header({"a": entry(0, 15)}),  # not all of the file
        with_header({"a": entry(0, 8), "b": entry(9, 16)}),  # a gap
        with_header({"a": entry(0, 9), "b": entry(8, 16)}),  # twice the same
        with_header({"a": entry(0, 20), "b": entry(20, 16)}),
        with_header({}, b""),
    ],
)
def test_what_is_no_tensor_file_counts_as_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert spans_of(path) == [Span(0, len(content))]
    assert digest_of_file(path) == blake3(content).hexdigest()
