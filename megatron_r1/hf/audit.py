"""The audit of a conversion: every tensor that was read, every tensor that was written, which became which.

`tools/verify_checkpoint.py` holds a converted folder against it.

`audit.json` of what was converted:

    source, target   what was converted, and into what
    files            file -> size, digest (checkpoint/digest.py)
    read             the source's tensor -> dtype, shape, blake3 of its bytes, and `to`: the tensors it became
    written          tensor -> file, dtype, shape, blake3 of its bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import TYPE_NAMES
from megatron_r1.errors import DataError
from megatron_r1.files import read_json
from megatron_r1.hf.fp8_blocks import SCALE_SUFFIX

AUDIT_FILE = "audit.json"
Audit = dict[str, Any]


class TensorHashes:
    """BLAKE3 of tensors that share memory: what begins where another one began is hashed from there on only.

    So a tensor that is passed on is hashed once, and so is the first part of one that is divided. The tensors must stay
    as long as this object.
    """

    def __init__(self) -> None:
        self._begun: dict[int, list[tuple[int, Any]]] = {}

    def of(self, tensor: Tensor) -> str:
        """BLAKE3 of the tensor's numbers in hex."""
        bytes_N = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        begun = self._begun.setdefault(bytes_N.ctypes.data, []) if tensor.is_cpu and tensor.is_contiguous() else []
        done, known = max((each for each in begun if each[0] <= bytes_N.size), default=(0, blake3()), key=_size)
        if done < bytes_N.size or not begun:
            known = known.copy()
            known.update(bytes_N[done:].data)
            begun.append((bytes_N.size, known))
        digest: str = known.hexdigest()
        return digest


def _size(begun: tuple[int, Any]) -> int:
    return begun[0]


def described(tensor: Tensor, hashes: TensorHashes | None = None) -> dict[str, Any]:
    """A tensor's type, shape and BLAKE3 as JSON has them."""
    digest = (hashes or TensorHashes()).of(tensor)
    return {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "blake3": digest}


def audit_of_mapping(read: Mapping[str, Tensor], written: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Audit:
    """What the tensors of one parameter mapping add to the audit of one file.

    Args:
        read: the source's tensors.
        written: all tensors that they became.
        here: those of `written` that are in this file.
    """
    hashes = TensorHashes()
    written_here = {name: described(tensor, hashes) for name, tensor in here.items()}  # first: parts of what was read
    written_to = {name: [to for to in written_names(name, written) if to in here] for name in read}
    return {
        "read": {name: described(read[name], hashes) | {"to": to} for name, to in written_to.items() if to},
        "written": written_here,
    }


def merge_audits(audits: Mapping[str, Audit]) -> Audit:
    """One audit of the audits of all files.

    Raises:
        DataError: a tensor that several files took numbers from was not the same each time.
    """
    read: dict[str, dict[str, Any]] = {}
    written: dict[str, dict[str, Any]] = {}
    for file, audit in audits.items():
        for name, tensor in audit["read"].items():
            first = read.setdefault(name, tensor | {"to": []})
            if first["blake3"] != tensor["blake3"]:
                raise DataError(f"{name}: changed while it was read")
            first["to"] = first["to"] + tensor["to"]
        written |= {name: {"file": file, **tensor} for name, tensor in audit["written"].items()}
    return {"read": read, "written": written}


def read_audit(folder: Path) -> Audit:
    """The audit of a converted folder. Raises DataError."""
    audit = read_json(folder / AUDIT_FILE)
    if not isinstance(audit.get("read"), dict) or not isinstance(audit.get("written"), dict):
        raise DataError(f"{folder / AUDIT_FILE}: is no audit of a conversion")
    return audit


def check_audit(audit: Audit, written: Mapping[str, Tensor], read: Mapping[str, Tensor] | None = None) -> int:
    """Hold tensors against an audit: all of them, to the last bit, and nothing else.

    Args:
        written: the converted tensors: a TensorFolder, or a checkpoint's WholeTensors.
        read: the source's, where they are still there.

    Returns:
        How many tensors were compared.

    Raises:
        DataError: names the first that differs, or whose numbers went nowhere or came from nowhere.
    """
    to_names = {to for tensor in audit["read"].values() for to in tensor["to"]}
    for name, tensor in audit["read"].items():
        if not tensor["to"]:
            raise DataError(f"{name}: was read, and nothing holds its numbers")
    if strange := to_names ^ audit["written"].keys():
        raise DataError(f"{min(strange)}: read and written tensors of the audit do not match")
    _compare(audit["written"], written)
    if read is not None:
        _compare(audit["read"], read)
    return len(audit["written"]) + (len(audit["read"]) if read is not None else 0)


def _compare(recorded: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    if different := recorded.keys() ^ set(tensors):
        name = min(different)
        raise DataError(f"{name}: {'is missing' if name in recorded else 'is not in the audit'}")
    for name, expected in recorded.items():
        found = described(tensors[name])
        for key, value in found.items():
            if value != expected[key]:
                raise DataError(f"{name}: {key} is {value}, in the audit {expected[key]}")


def written_names(name: str, written: Mapping[str, Tensor]) -> list[str]:
    """The written tensors that hold a read tensor's numbers: the one of its name with its scales, else all of them."""
    weight = name.removesuffix(SCALE_SUFFIX)
    return [to for to in written if to.removesuffix(SCALE_SUFFIX) == weight] or list(written)
