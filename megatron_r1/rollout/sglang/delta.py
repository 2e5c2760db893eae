"""Has an SGLang 0.5.23 server take deltas of its weights (rollout/sync/delta.py), as a part of this package's plugin.

A delta becomes whole tensors again, with NaN wherever nothing changed, and SGLang's own loaders bring them to their
parameters: fused, sharded and transposed as they are. While they do, what they copy leaves a parameter as it is where
the source is NaN. That needs parameters which hold the loaded numbers themselves: no quantised or repacked ones.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.rollout.sync.delta import MARK, decode

VARIABLE = "MEGATRON_R1_DELTA"
ENVIRONMENT = {VARIABLE: "1"}
"""Environment variables of a server that takes deltas."""


class Delta(list[tuple[str, torch.Tensor]]):
    """Names and tensors in which NaN stands for what the server has."""


class KeepWhereNan(TorchDispatchMode):
    """Inside the block a copy leaves its target as it is where the source is NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source, *rest = args
            args = (target, torch.where(source.isnan(), target, source), *rest)
        return func(*args, **(kwargs or {}))


def register() -> None:
    """Called in each process of a server; acts where the environment asks for it."""
    if os.environ.get(VARIABLE) != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    HookRegistry.register(f"{updater}._receive_bucketed_weights_from_distributed", _receive, HookType.AROUND)
    HookRegistry.register(f"{updater}.load_weights_from_distributed", _load, HookType.AROUND)


def _receive(original: Any, updater: Any, **given: Any) -> Any:
    """In place of WeightUpdater._receive_bucketed_weights_from_distributed, with its arguments."""
    *dtypes, last = given["dtypes"]
    if last != MARK:
        return original(updater, **given)
    *shapes, (nbytes, *counts) = given["shapes"]
    content = torch.empty(nbytes, dtype=torch.uint8, device=updater.device)
    dist.broadcast(content, src=0, group=updater._model_update_group[given["group_name"]])
    names = given["names"][:-1]
    entries = [
        Entry(name, getattr(torch, dtype), tuple(shape))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]
    return Delta(zip(names, decode(entries, counts, content), strict=True))


def _load(original: Any, updater: Any, named_tensors: Any) -> Any:
    """In place of WeightUpdater.load_weights_from_distributed."""
    with KeepWhereNan() if isinstance(named_tensors, Delta) else nullcontext():  # type: ignore[no-untyped-call]
        return original(updater, named_tensors)
