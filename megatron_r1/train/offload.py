"""A trainer's memory given back for a while, so that an engine on the same devices can have it.

What is moved are storages, not tensors: each goes to host memory once, whatever views it has, and is emptied where it
lay. All views stay what they are, and are valid again, with the same bits, when it is back: megatron-core's parameters
are views of its buffers, and fp32 master weights are views of parameters. (megatron-core's buffers can do this for
themselves; frozen weights, master weights and moments lie elsewhere.)

On a CPU storages are emptied and filled just the same, but nothing is saved: the host memory that they go to is the
memory that they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

from megatron_r1.model.chunks import Model
from megatron_r1.train.optimizer import Optimizer

Tensors = Callable[[], Iterable[Tensor]]


class Offloaded:
    """Tensors that can leave their device and come back; between the two nobody may read them.

    On a CPU none of them may ever have been seen by numpy: torch does not resize such a storage again.

    Attributes:
        nbytes: bytes that they do not take on the device at present.
    """

    def __init__(self, device: torch.device, kept: Tensors, dropped: Tensors = tuple, staying: Tensors = tuple):
        """
        Args:
            device: what lies elsewhere is left alone.
            kept: the tensors, looked up anew each time: an optimizer makes its moments at the first update.
            dropped: further ones that nobody needs the contents of; they come back as zeros.
            staying: tensors whose storages are left alone, though others may be views of them.
        """
        self._device, self._kept, self._dropped, self._staying = device, kept, dropped, staying
        self._away: list[tuple[UntypedStorage, int, UntypedStorage | None]] = []
        self._spare: list[UntypedStorage] = []
        self.nbytes = 0

    def offload(self) -> None:
        """Move to host memory, pinned where the device is a GPU, and free the device's; does nothing when away."""
        if self._away:
            return
        staying = self._storages(self._staying())
        kept = self._storages(self._kept(), staying)
        dropped = self._storages(self._dropped(), staying | kept)
        if stuck := sum(not storage.resizable() for storage in (kept | dropped).values()):
            raise RuntimeError(f"{stuck} storages cannot be emptied: something else looks at their memory")
        for storage in kept.values():
            host = self._host(storage.nbytes())
            host.copy_(storage, non_blocking=True)
            self._away.append((storage, storage.nbytes(), host))
        self._away += [(storage, storage.nbytes(), None) for storage in dropped.values()]
        self._synchronize()
        for storage, size, _ in self._away:
            storage.resize_(0)
            self.nbytes += size
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # to the driver: the engine is another process

    def onload(self) -> None:
        """Take the device's memory again, and fill it with what was there; does nothing when not away."""
        for storage, size, host in self._away:
            storage.resize_(size)
            if host is None:
                storage.fill_(0)  # type: ignore[attr-defined]
            else:
                storage.copy_(host, non_blocking=True)
        self._synchronize()
        if self._device.type == "cuda":
            # Pinning takes the system longer than copying.
            self._spare = [host for _, _, host in self._away if host is not None]
        self._away, self.nbytes = [], 0

    def _storages(self, tensors: Iterable[Tensor], but: Container[int] = ()) -> dict[int, UntypedStorage]:
        """Each storage of the device once, by what tells it from others."""
        found: dict[int, UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device == self._device and storage.nbytes() and storage._cdata not in but:
                found[storage._cdata] = storage
        return found

    def _host(self, size: int) -> UntypedStorage:
        """Host memory of this size: that of last time where there is some."""
        for place, spare in enumerate(self._spare):
            if spare.nbytes() == size:
                return self._spare.pop(place)
        pinned = self._device.type == "cuda"
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).untyped_storage()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TrainerMemory:
    """What a rank's trainer holds between steps, in the two parts in which it gives it back.

    Attributes:
        weights: parameters and buffers of the model.
        rest: master weights and moments; gradients, which the next update clears anyway, are dropped.
    """

    def __init__(self, model: Model, optimizer: Optimizer):
        device = next(model.parameters()).device

        def weights() -> Iterator[Tensor]:
            yield from model.parameters()
            yield from model.buffers()
            yield from (buffer.param_data for buffer in optimizer.buffers() if buffer.param_data is not None)

        def gradients() -> Iterator[Tensor]:
            yield from (buffer.grad_data for buffer in optimizer.buffers())

        def optimizer_state() -> Iterator[Tensor]:
            for param_state in optimizer.param_states():
                yield param_state.weight_N
                state = param_state.optimizer.state.get(param_state.weight_N, {})
                yield from (value for value in state.values() if isinstance(value, Tensor))

        self.weights = Offloaded(device, weights)
        self.rest = Offloaded(device, optimizer_state, gradients, staying=weights)
