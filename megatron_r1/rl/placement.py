"""Where the engine runs, and therefore who uses the devices' memory in which phase of a step.

| phase of a step | `Separate` | `Colocated`: in the devices' memory |
|---|---|---|
| `engine_phase`: the engine receives weights | | the trainer's weights, the engine's weights, one bucket |
| `generating`: the engine samples responses | | the engine's weights and cache |
| after both: the trainer trains, until the next step | | the trainer's weights, gradients and optimizer state |
| `starting_servers` | | the engine |

All ranks enter a phase; `generating` is nested in `engine_phase`. When a step cannot start because the engine is gone
(StepUnavailable, on all ranks), the trainer's memory is restored, so that it can save its state. After any other error
memory is not restored: the run ends, and some ranks may have failed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from megatron_r1.parallel import comm
from megatron_r1.rollout.sglang.servers.memory import CACHE, WEIGHTS
from megatron_r1.train.loop import StepUnavailable
from megatron_r1.train.offload import TrainerMemory


class OffloadableEngine(Protocol):
    """An engine that can release its memory."""

    @property
    def has_dead_server(self) -> bool: ...

    def release_memory(self) -> None: ...

    def resume_memory(self, tags: Sequence[str]) -> None: ...

    def restart_dead(self) -> None: ...


class Placement(Protocol):
    """Gives the devices' memory to the trainer or the engine."""

    def starting_servers(self) -> AbstractContextManager[None]:
        """Around the start of servers; at its end they have released their memory."""
        ...

    def attach(self, engine: OffloadableEngine) -> None:
        """On rank 0, inside `starting_servers`: the engine whose servers have started."""
        ...

    def engine_phase(self) -> AbstractContextManager[None]:
        """Around the update of the engine's weights and the generation."""
        ...

    def generating(self) -> AbstractContextManager[None]:
        """Around the generation; the end of the engine phase ends it too."""
        ...


class Separate:
    """The engine has devices of its own."""

    starting_servers = engine_phase = generating = staticmethod(nullcontext)

    def attach(self, engine: OffloadableEngine) -> None:
        pass


class Colocated:
    """Engine and trainer share their devices."""

    def __init__(self, memory: TrainerMemory):
        """
        Args:
            memory: of this rank's trainer.
        """
        self._weights, self._rest = memory.weights, memory.rest
        self._engine: OffloadableEngine | None = None

    def attach(self, engine: OffloadableEngine) -> None:
        engine.release_memory()
        self._engine = engine

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
        if self._engine:
            self._engine.resume_memory(WEIGHTS)
        try:
            yield
        except StepUnavailable:
            self._trainer_phase()
            raise
        self._trainer_phase()

    @contextmanager
    def generating(self) -> Iterator[None]:
        self._weights.offload()
        comm.barrier()
        if self._engine:
            self._engine.resume_memory(CACHE)
        yield

    def _trainer_phase(self) -> None:
        if self._engine:
            self._engine.release_memory()
        comm.barrier()
        self._weights.onload()
        self._rest.onload()

    def _start_missing(self) -> None:
        """Restart servers that died while the trainer trained: a start needs as much memory as sampling."""
        if not comm.any_rank(bool(self._engine and self._engine.has_dead_server)):
            return
        self._weights.offload()
        comm.barrier()
        if self._engine:
            self._engine.restart_dead()
        comm.barrier()
        self._weights.onload()
