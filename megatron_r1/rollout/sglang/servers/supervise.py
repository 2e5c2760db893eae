"""Supervises servers: one that died or hangs is restarted, and takes requests once its weights are current.

A server is healthy while its process lives, it answers, and it makes progress: tokens while it has requests, else its
scheduler's time stamp. Answering alone says little: SGLang's front end answers for a scheduler that is stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.pool.retries import StateChanged, backoff_s
from megatron_r1.rollout.sglang.pool.server import PoolServer
from megatron_r1.rollout.sglang.servers.memory import IN_TRAINER_PHASE, ServerMemory
from megatron_r1.rollout.sglang.servers.process import Server

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two checks whether a process lives."""
DYING_S = 1.0
"""Within this time a process that was killed has ended."""
HEALTH_TIMEOUT_S = 30.0
RESTART_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0


@dataclass
class CurrentWeights:
    """The weights that all servers must serve."""

    versions: list[str]
    """All that the servers have had, in order."""
    source: Path | None
    """Folder that holds them; None where only the servers' and the trainer's memory does."""
    inconsistent_reason: str = ""
    """Why nobody knows which weights the servers have, after an update that failed half way; else empty."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the weights are updated, and while a restarted server loads them."""

    @property
    def version(self) -> str:
        """The version that all servers must have."""
        return self.versions[-1]

    @property
    def folder(self) -> Path | None:
        """The folder, as long as it exists."""
        return self.source if self.source and (self.source / "config.json").is_file() else None


class HangDetector:
    """Measures how long a server has made no progress."""

    def __init__(self, hang_timeout_s: float, clock: Callable[[], float] = time.monotonic):
        self._timeout, self._clock = hang_timeout_s, clock
        self._marker: Any = None
        self._since = clock()

    def observe(self, marker: object) -> None:
        """A marker (`Client.progress`) that differs from the last one is progress."""
        if marker != self._marker:
            self._marker, self._since = marker, self._clock()

    def stalled_s(self) -> float:
        """Seconds without progress where they are too many, else 0."""
        seconds = self._clock() - self._since
        return seconds if seconds > self._timeout else 0.0


class SupervisedServer:
    """One supervised server, which this program or somebody else started.

    Args:
        server: in the pool.
        config: of the servers.
        weights: that it must serve.
        changed: notified when the server opens or closes.
        launch: starts its process at its address; None where somebody else starts it.
    """

    def __init__(
        self,
        server: PoolServer,
        config: SGLangConfig,
        weights: CurrentWeights,
        changed: StateChanged,
        launch: Callable[[], Server] | None,
    ):
        self.server, self._config, self._weights, self._changed = server, config, weights, changed
        self._launch = launch
        self.process: Server | None = None
        self.memory = ServerMemory(server.client)
        """What its process holds."""
        self.may_start = asyncio.Event()
        """Unset, it is not restarted: a trainer has its devices."""
        self.may_start.set()
        server.gone = self.gone
        self.up = False
        """It answers, whatever its weights."""
        self.given_up = False
        self.trouble = ""
        """Why it was last found unhealthy; empty while it is up."""
        self.restarts = 0
        """Restarts of its process."""
        self.updating = False
        """Its weights are being updated: no progress is expected."""
        self._restarts_in_a_row, self._unknown_because = 0, ""

    @property
    def url(self) -> str:
        return self.server.name

    def launch(self) -> None:
        """Start the process, if it is this program's."""
        if self._launch:
            self.process = self._launch()
            self.memory.reset()

    async def come_up(self) -> None:
        """Return when the server answers.

        Raises:
            NoRolloutCapacity: it ended, or did not answer within `start_timeout_s`.
        """
        deadline = time.monotonic() + self._config.start_timeout_s
        while self.process and not self.process.accepts():
            self.process.check()
            if time.monotonic() > deadline:
                limit = f"rollout.sglang.start_timeout_s={self._config.start_timeout_s:g}"
                raise NoRolloutCapacity(f"SGLang server does not answer within {limit}: {self.process.failure_line()}")
            await asyncio.sleep(0.05)
        await self.server.client.weight_version()
        self.up, self.trouble = True, ""

    async def supervise(self) -> None:
        """Restart the server whenever it is unhealthy, until cancelled or given up."""
        try:
            while not self.given_up:
                trouble = await self._until_unhealthy()
                logger.error("server %s: %s", self.url, trouble)
                self.up, self.trouble = False, trouble
                if self.gone():
                    self.server.version = ""
                self.server.evict(trouble)
                self._changed.notify()
                await self._recover()
                self._changed.notify()
        except Exception as error:
            # Nobody awaits this task: its end must show where requests wait.
            logger.exception("supervision of server %s stopped", self.url)
            self.up, self.given_up, self.trouble = False, True, f"its supervision failed: {error!r}"
            self.server.evict(self.trouble)
            self._changed.notify()

    def mark_unknown(self, reason: str) -> None:
        """Have the server restarted: nobody knows which weights it has."""
        self._unknown_because = reason

    async def rejoin(self, first: bool = False) -> None:
        """Load the current weights into the server, where a folder has them, and let it take requests.

        Args:
            first: the weights that it has so far are not this program's, whatever their version is called.
        """
        async with self._weights.lock:
            weights, client = self._weights, self.server.client
            if self.memory.released:
                self.server.close(IN_TRAINER_PHASE)
                return
            if weights.inconsistent_reason:
                self.server.close(f"it waits for the next update: {weights.inconsistent_reason}")
                return
            self.server.version = await client.weight_version()
            foreign = first and self._launch is None
            if (foreign or self.server.version != weights.version) and weights.folder:
                await client.load_weights(str(weights.folder.resolve()), weights.version)
                self.server.version = weights.version
            if self.server.version == weights.version:
                self.server.open()
            else:
                self.server.close("it waits for the next update: only the trainer has the current weights")

    def open_if_current(self) -> None:
        """Take requests again after weights were updated."""
        current = self.server.version == self._weights.version and not self._weights.inconsistent_reason
        if self.up and current and not self.memory.released:
            self.server.open()

    def lost_for_good(self) -> bool:
        """Whether only another update can bring it to the current weights."""
        beyond_reach = self._weights.folder is None and self.server.version != self._weights.version
        return self.given_up or beyond_reach

    async def stop(self) -> None:
        """Kill the process and remove what it left, if it is this program's."""
        if self.process:
            await asyncio.to_thread(self.process.close)

    def check(self) -> None:
        """Raise NoRolloutCapacity, with the reason, when the server is down."""
        if self.trouble:
            raise NoRolloutCapacity(self.trouble)
        if self.process:
            self.process.check()

    async def check_after_failure(self) -> None:
        """As `check`, of a server that has just failed: a killed process refuses connections before it has ended."""
        deadline = time.monotonic() + DYING_S
        while self.process and not self.gone() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.check()

    def gone(self) -> bool:
        """Whether its process has ended, as far as this program can see."""
        return self.process is not None and self.process.ended

    def can_return(self) -> bool:
        """Whether the server may come back when it is down now."""
        return not self.given_up and (self.process is None or self._config.pool.restarts > 0)

    async def settled(self) -> None:
        """Return when the server answers.

        Raises:
            NoRolloutCapacity: it will not, or does not in time.
        """
        deadline = time.monotonic() + self._config.start_timeout_s + HEALTH_TIMEOUT_S
        while not self.up or self.gone():
            if self.given_up or time.monotonic() > deadline:
                raise NoRolloutCapacity(self.trouble or f"{self.server.name}: does not answer")
            await asyncio.sleep(0.05)

    async def _until_unhealthy(self) -> str:
        """Why the server is unhealthy, as soon as it is."""
        progress, next_check, silence = HangDetector(self._config.pool.hang_timeout_s), 0.0, ""
        while True:
            if self.process and self.gone():
                return self.process.exit_reason()
            if self._unknown_because:
                reason, self._unknown_because = self._unknown_because, ""
                return reason
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + self._config.pool.health_interval_s
                try:
                    async with asyncio.timeout(HEALTH_TIMEOUT_S):
                        progress.observe(await self.server.client.progress())
                    silence = ""
                except (NoRolloutCapacity, TimeoutError) as error:
                    silence = str(error) or f"no reply within {HEALTH_TIMEOUT_S:g} s"
                if self.updating:
                    progress.observe(object())
                if seconds := progress.stalled_s():
                    return f"no progress for {seconds:.0f} s {f'({silence})' if silence else ''}"
            await asyncio.sleep(min(POLL_S, self._config.pool.health_interval_s))

    async def _recover(self) -> None:
        """Restart the server, or give it up."""
        self._restarts_in_a_row = 0 if self.server.answered else self._restarts_in_a_row
        while True:
            if self.process and self._restarts_in_a_row >= self._config.pool.restarts:
                self.given_up, self.trouble = True, f"given up after {self._restarts_in_a_row} restarts: {self.trouble}"
                await self.stop()
                self.server.close(self.trouble)
                return
            try:
                if self.process:
                    await self._restart()
                await self.come_up()
                await self.rejoin()
                logger.warning("server %s restarted and serving version %s", self.url, self.server.version or "unknown")
                return
            except (NoRolloutCapacity, OSError) as error:
                self.trouble = str(error)
                logger.error("server %s: %s", self.url, error)
                if not self.process:
                    await asyncio.sleep(self._config.pool.health_interval_s)

    async def _restart(self) -> None:
        if self._restarts_in_a_row:
            await asyncio.sleep(backoff_s(self._restarts_in_a_row + 1, RESTART_BACKOFF_S, LONGEST_BACKOFF_S))
        self._restarts_in_a_row += 1
        self.restarts += 1
        await self.stop()
        self.server.version = ""
        self._changed.notify()
        await self.may_start.wait()
        self.launch()


@contextlib.asynccontextmanager
async def supervised(servers: list[SupervisedServer]) -> AsyncIterator[None]:
    """Supervises the servers inside the block."""
    tasks = [asyncio.ensure_future(one.supervise()) for one in servers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
