"""An exponential moving average of the weights in host memory (DeepSeek-V3 report, section 3.2.3).

Every rank averages the shards that it owns, so each number is stored once in the whole job. On CUDA the weights are
copied to pinned memory after the step's own work on the device, and a thread averages them while the next step runs; on
a CPU they are averaged at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from megatron_r1.model.chunks import Model
from megatron_r1.model.shards import Shard, part_of, shards


class MovingAverage:
    """average = decay * average + (1 - decay) * weights, over parameters and the routers' balancing bias, in fp32."""

    def __init__(self, model: Model, decay: float):
        """
        Args:
            model: its optimizer must exist already, because creating one moves the weights to other memory.
            decay: per update, in [0, 1).
        """
        self._model, self._weight = model, 1.0 - decay
        self._shards = [shard for shard in shards(model) if shard.owned]
        self._averages = [shard.tensor.to("cpu", torch.float32, copy=True) for shard in self._shards]
        self._on_device = any(shard.tensor.is_cuda for shard in self._shards)
        self._copies = [
            torch.empty_like(shard.tensor, device="cpu", pin_memory=True) for shard in self._shards if self._on_device
        ]
        self._worker = ThreadPoolExecutor(1, "ema") if self._on_device else None
        self._pending: Future[None] | None = None

    def update(self) -> None:
        """Add the current weights to the average."""
        if self._worker is None:
            self._add([shard.tensor for shard in self._shards])
            return
        self.settle()
        # On the device's stream: after this step's update, before that of the next step.
        for copy, shard in zip(self._copies, self._shards, strict=True):
            copy.copy_(shard.tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = self._worker.submit(self._add_when, copied)

    def settle(self) -> None:
        """Wait until the last update is in the average.

        Raises:
            Exception: the error of the thread that averages.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def shards(self) -> Iterator[Shard]:
        """The shards that this rank owns, with the average in place of the weight."""
        self.settle()
        for shard, average in zip(self._shards, self._averages, strict=True):
            yield replace(shard, tensor=average)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the average from whole tensors.

        Raises:
            DataError: a tensor is missing or has another shape.
        """
        for shard, average in zip(self._shards, self._averages, strict=True):
            average.copy_(part_of(tensors, shard))

    def close(self) -> None:
        """Finish the last update and end the thread."""
        self.settle()
        if self._worker:
            self._worker.shutdown()

    def _add_when(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._add(self._copies)

    def _add(self, weights: list[Tensor]) -> None:
        torch._foreach_lerp_(self._averages, [weight.float() for weight in weights], self._weight)
