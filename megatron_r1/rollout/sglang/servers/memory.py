"""What one server's process holds of its memory, where servers and a trainer use the same devices by turns.

SGLang 0.5.23 releases memory by tags. A server crashes when it is told to release while a request runs, and when it is
told to resume what it has not released; so this object records what each process holds, and nothing else makes those
calls. After a failed call nobody knows what the process holds: it must be killed and restarted. A new process holds all
of its memory.

A server frees memory only where it was started with `rollout.sglang.server.memory_saver`, which needs CUDA; without
it the calls succeed just the same.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Client
from megatron_r1.rollout.sglang.replies import BadReply

WEIGHTS = ("weights",)
CACHE = ("kv_cache", "cuda_graph")
"""What generation needs beside the weights."""
EVERYTHING = (*WEIGHTS, *CACHE)
IN_TRAINER_PHASE = "the trainer has the devices: the servers have released their memory"
IDLE_S = 10.0
"""Seconds that a server may take to end the requests that it was told to abort."""


class ServerMemory:
    """The memory of one server's process.

    Attributes:
        released: tags of what it does not hold.
    """

    def __init__(self, client: Client):
        self._client = client
        self.released: frozenset[str] = frozenset()
        self._unknown_because = ""

    def reset(self) -> None:
        """The process is a new one, which holds everything."""
        self.released, self._unknown_because = frozenset(), ""

    async def release(self) -> None:
        """Release everything that is held; aborts what the server still generates.

        Raises:
            NoRolloutCapacity: the server failed; what it holds is not known, and it must be restarted.
        """
        if held := [tag for tag in EVERYTHING if tag not in self.released]:
            await self._change(self._become_idle)
            await self._change(lambda: self._client.release_memory(held))
            self.released = frozenset(EVERYTHING)

    async def resume(self, tags: Sequence[str]) -> None:
        """Hold this again, as far as it was released. Its content is arbitrary.

        Raises:
            NoRolloutCapacity: as of `release`.
        """
        if missing := [tag for tag in tags if tag in self.released]:
            await self._change(lambda: self._client.resume_memory(missing))
            self.released -= set(missing)

    async def _change(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._unknown_because:
            raise NoRolloutCapacity(f"nobody knows what memory the server holds: {self._unknown_because}")
        try:
            await call()
        except BaseException as error:
            self._unknown_because = str(error) or type(error).__name__
            raise

    async def _become_idle(self) -> None:
        """Return when the server itself says that no request runs: calls that were given up may still run."""
        try:
            await self._client.flush(0.0)
        except BadReply:
            await self._client.abort_all()
            await self._client.flush(IDLE_S)
