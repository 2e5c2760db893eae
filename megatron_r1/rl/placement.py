"""Where the engine runs, and so who has the devices' memory when.

| step | `Separate` | `Colocated`: the devices hold |
|---|---|---|
| weights are sent | | the trainer's weights, the engine's weights, one bucket |
| answers are sampled | | the engine's weights and cache |
| the trainer learns, and what follows until the next step | | the trainer's weights, gradients and optimizer state |
| servers are started | | the engine |

A strategy is entered by all ranks, nested: `sending` around all that the engine does in a step, `sampling` inside it.
When a step cannot begin for want of an engine (CannotBegin, on all ranks), the trainer has its memory again, to save
what it has learnt. After any other failure nothing is put in order: the run ends, and ranks may have failed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from megatron_r1.parallel import comm
from megatron_r1.rollout.sglang.servers.memory import CACHE, WEIGHTS
from megatron_r1.train.loop import StepUnavailable
from megatron_r1.train.offload import TrainerMemory


class Placement(Protocol):
    """Gives memory to whoever needs it."""

    def starting_servers(self) -> AbstractContextManager[None]:
        """Around the start of servers, which end the block without memory."""
        ...

    def engine_phase(self) -> AbstractContextManager[None]:
        """Around the update of the engine's weights and the sampling."""
        ...

    def generating(self) -> AbstractContextManager[None]:
        """Around the sampling."""
        ...


class Separate:
    """The engine has devices of its own."""

    starting_servers = engine_phase = generating = staticmethod(nullcontext)


class OffloadableEngine(Protocol):
    """An engine whose memory can be given back."""

    @property
    def has_dead_server(self) -> bool: ...

    def release_memory(self) -> None: ...

    def resume_memory(self, tags: Sequence[str]) -> None: ...

    def restart_dead(self) -> None: ...


class Colocated:
    """Engine and trainer share their devices.

    Args:
        memory: this rank's trainer.

    Attributes:
        engine: on rank 0; set when it has started.
    """

    def __init__(self, memory: TrainerMemory):
        self._weights, self._rest = memory.weights, memory.rest
        self.engine: OffloadableEngine | None = None

    @contextmanager
    def starting_servers(self) -> Iterator[None]:
        self._rest.offload()
        self._weights.offload()
        comm.barrier()
        yield
        comm.barrier()
        self._weights.onload()
        self._rest.onload()

    @contextmanager
    def engine_phase(self) -> Iterator[None]:
        self._rest.offload()
        self._start_missing()
        comm.barrier()
        if self.engine:
            self.engine.resume_memory(WEIGHTS)
        try:
            yield
        except StepUnavailable:
            self._trainers_turn()
            raise
        self._trainers_turn()

    @contextmanager
    def generating(self) -> Iterator[None]:
        self._weights.offload()
        comm.barrier()
        if self.engine:
            self.engine.resume_memory(CACHE)
        yield  # `sending` ends this block too

    def _trainers_turn(self) -> None:
        if self.engine:
            self.engine.release_memory()
        comm.barrier()
        self._weights.onload()
        self._rest.onload()

    def _start_missing(self) -> None:
        """A server takes as much memory to start as to answer: those that ended in the trainer's turn start alone."""
        if not comm.any_rank(bool(self.engine and self.engine.has_dead_server)):
            return
        self._weights.offload()
        comm.barrier()
        if self.engine:
            self.engine.restart_dead()
        comm.barrier()
        self._weights.onload()
