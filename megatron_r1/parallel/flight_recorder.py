"""The flight recorder of torch.distributed: the last collective operations of this process, with their states."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

SIZE = "2000"
"""Operations that are kept, for each process group's backend."""


def record() -> None:
    """Have the recorder run, before torch.distributed starts; what the user has set stays."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its old name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", SIZE)


def last_collectives() -> Mapping[str, bytes]:
    """By backend, the recorder's JSON; only backends that have recorded an operation.

    torch's analyser reads the same (`torchfrtrace`); of NCCL the operation that has not retired is the one that hangs.
    """
    recorders = {"collectives-nccl": "_dump_nccl_trace_json", "collectives-gloo": "_dump_fr_trace_json"}
    c10d = torch._C._distributed_c10d
    found = {name: getattr(c10d, dump)() for name, dump in recorders.items() if hasattr(c10d, dump)}
    return {name: content for name, content in found.items() if b'"entries":[{' in content}
