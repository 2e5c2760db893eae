"""Hashes of tensors that share memory are those of their bytes, whichever was hashed first."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from megatron_r1.hf import audit as module
from megatron_r1.hf.audit import TensorHashes, audit_of_mapping


def digest_of(tensor: Tensor) -> str:
    return blake3(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def test_parts_in_any_order() -> None:
    whole = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    views = [whole, whole[:4], whole[4:], whole[:0], whole[:9], whole[4:6], whole.T, whole.reshape(-1)]
    for order in itertools.islice(itertools.permutations(views), 0, None, 97):
        hashes = TensorHashes()
        assert [hashes.of(view) for view in order] == [digest_of(view) for view in order]


class Counting:
    """BLAKE3 that counts the bytes given to it."""

    counted = 0

    def __init__(self, known: Any = None):
        self._known = known or blake3()

    def copy(self) -> Counting:
        return Counting(self._known.copy())

    def update(self, content: memoryview) -> None:
        Counting.counted += len(content)
        self._known.update(content)

    def hexdigest(self) -> str:
        return self._known.hexdigest()


def test_no_byte_is_hashed_twice_that_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "blake3", Counting)
    whole = torch.randn(10, 100)
    gate, up = whole[:4], whole[4:]
    audit = audit_of_mapping({"whole": whole}, {"gate": gate, "up": up}, {"gate": gate, "up": up})
    assert Counting.counted == whole.nbytes + up.nbytes
    assert audit["read"]["whole"]["to"] == ["gate", "up"]
    Counting.counted = 0
    audit = audit_of_mapping({"same": whole}, {"one": whole.view(100, 10)}, {"one": whole.view(100, 10)})
    assert Counting.counted == whole.nbytes
    assert audit["written"]["one"]["blake3"] == audit["read"]["same"]["blake3"]
