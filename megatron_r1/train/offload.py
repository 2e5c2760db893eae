"""Offloads a trainer's memory for a while, so that an engine on the same devices can use it.

Storages are moved, not tensors: each storage is copied to host memory once, however many views it has, and its device
memory is freed. All views stay valid objects and have the same bits again after `onload`: megatron-core's parameters
are views of its buffers, and fp32 master weights are views of parameters. (megatron-core can offload its own buffers;
frozen weights, master weights and moments are elsewhere.)

On a CPU storages are emptied and filled in the same way, but that saves no memory: the copies are in host memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

from megatron_r1.model.chunks import Model
from megatron_r1.train.optimizer import Optimizer

Tensors = Callable[[], Iterable[Tensor]]


class Offloaded:
    """Tensors that can be moved off their device and back; in between they must not be read.

    On a CPU none of them may have been shared with numpy: torch cannot resize the storage of such a tensor again.

    Attributes:
        nbytes: bytes of device memory that are freed at present.
    """

    def __init__(self, device: torch.device, saved: Tensors, dropped: Tensors = tuple, staying: Tensors = tuple):
        """
        Args:
            device: tensors on other devices are ignored.
            saved: returns the tensors; called every time, because an optimizer makes its moments at the first update.
            dropped: returns further tensors whose contents are not needed; they come back as zeros.
            staying: returns tensors whose storages stay on the device, though other tensors may be views of them.
        """
        self._device, self._saved, self._dropped, self._staying = device, saved, dropped, staying
        self._away: list[tuple[UntypedStorage, int, UntypedStorage | None]] = []
        self._spare: list[UntypedStorage] = []
        self.nbytes = 0

    def offload(self) -> None:
        """Copy to host memory, pinned for a GPU, and free the device's memory; no effect when offloaded already."""
        if self._away:
            return
        staying = self._storages(self._staying())
        saved = self._storages(self._saved(), staying)
        dropped = self._storages(self._dropped(), staying | saved)
        if stuck := sum(not storage.resizable() for storage in (saved | dropped).values()):
            raise RuntimeError(f"{stuck} storages cannot be emptied: other objects use their memory")
        for storage in saved.values():
            host = self._host(storage.nbytes())
            host.copy_(storage, non_blocking=True)
            self._away.append((storage, storage.nbytes(), host))
        self._away += [(storage, storage.nbytes(), None) for storage in dropped.values()]
        self._synchronize()
        for storage, size, _ in self._away:
            storage.resize_(0)
            self.nbytes += size
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # returns the memory to the driver, because the engine is another process

    def onload(self) -> None:
        """Allocate the device's memory again and restore its contents; no effect when not offloaded."""
        for storage, size, host in self._away:
            storage.resize_(size)
            if host is None:
                storage.fill_(0)  # type: ignore[attr-defined]
            else:
                storage.copy_(host, non_blocking=True)
        self._synchronize()
        if self._device.type == "cuda":
            # Pinned memory is reused: pinning takes longer than copying.
            self._spare = [host for _, _, host in self._away if host is not None]
        self._away, self.nbytes = [], 0

    def _storages(self, tensors: Iterable[Tensor], but: Container[int] = ()) -> dict[int, UntypedStorage]:
        """Each storage on the device once, by its identity."""
        found: dict[int, UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device == self._device and storage.nbytes() and storage._cdata not in but:
                found[storage._cdata] = storage
        return found

    def _host(self, size: int) -> UntypedStorage:
        """Host memory of this size, reused from an earlier offload where possible."""
        for index, spare in enumerate(self._spare):
            if spare.nbytes() == size:
                return self._spare.pop(index)
        pinned = self._device.type == "cuda"
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).untyped_storage()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TrainerMemory:
    """Memory of a rank's trainer between steps, in the two parts in which it is offloaded.

    Attributes:
        weights: parameters and buffers of the model; FP8 copies of them are dropped, because the next pass makes them.
        rest: master weights and moments; gradients are dropped, because the next update clears them anyway.
    """

    def __init__(self, model: Model, optimizer: Optimizer):
        device = next(model.parameters()).device

        def weights() -> Iterator[Tensor]:
            yield from model.parameters()
            yield from model.buffers()
            yield from (buffer.param_data for buffer in optimizer.buffers() if buffer.param_data is not None)

        def quantised_copies() -> Iterator[Tensor]:
            """What Transformer Engine's modules keep of their weights from one micro-batch to the next."""
            copies = (copy for module in model.modules() for copy in getattr(module, "_fp8_workspaces", {}).values())
            yield from (data for copy in copies for data in copy.get_data_tensors() if data is not None)

        def gradients() -> Iterator[Tensor]:
            yield from (buffer.grad_data for buffer in optimizer.buffers())

        def optimizer_state() -> Iterator[Tensor]:
            for param_state in optimizer.param_states():
                yield param_state.weight_N
                state = param_state.optimizer.state.get(param_state.weight_N, {})
                yield from (value for value in state.values() if isinstance(value, Tensor))

        self.weights = Offloaded(device, weights, quantised_copies)
        self.rest = Offloaded(device, optimizer_state, gradients, staying=weights)
