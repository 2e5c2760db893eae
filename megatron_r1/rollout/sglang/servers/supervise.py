"""Servers that are watched: one that died or hangs is started again, and takes requests once its weights are current.

A server is well when its process lives, it answers, and it makes progress: tokens while it has requests, else its
scheduler's sign of life. Answering alone says little: SGLang's front end answers for a scheduler that is stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.pool.breaker import StateChanged, backoff_s
from megatron_r1.rollout.sglang.pool.member import PoolServer
from megatron_r1.rollout.sglang.servers.memory import TRAINERS_TURN, ServerMemory
from megatron_r1.rollout.sglang.servers.process import Server
from megatron_r1.rollout.sglang.versions import Versions

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks at whether a process lives."""
LONGEST_LOOK_S = 30.0
RESTART_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass
class CurrentWeights:
    """What servers must serve."""

    versions: Versions
    source: Path | None
    """Folder that holds them; None where only servers and the trainer's memory do."""
    doubt: str = ""
    """Why nobody knows what the servers have, after an update that failed half way; else empty."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while they are replaced, and while a server that was started again gets them."""

    @property
    def version(self) -> str:
        """The version that all servers must have."""
        return self.versions.current

    @property
    def folder(self) -> Path | None:
        """The folder, as long as it is there."""
        return self.source if self.source and (self.source / "config.json").is_file() else None


class Progress:
    """When a server was last seen to get on."""

    def __init__(self, hang_timeout_s: float, clock: Callable[[], float] = time.monotonic):
        self._timeout, self._clock = hang_timeout_s, clock
        self._marker: Any = None
        self._since = clock()

    def seen(self, marker: object) -> None:
        """What the server showed; that it is another than last time is progress."""
        if marker != self._marker:
            self._marker, self._since = marker, self._clock()

    def stalled_s(self) -> float:
        """Seconds without progress where they are too many, else 0."""
        seconds = self._clock() - self._since
        return seconds if seconds > self._timeout else 0.0


class SupervisedServer:
    """One server under watch, of this program or of somebody else.

    Args:
        member: the server in the pool.
        config: of the servers.
        weights: what it must serve.
        changed: told when the server opens or closes.
        launch: starts it on its address; None where it is somebody else's.
    """

    def __init__(
        self,
        member: PoolServer,
        config: SGLangConfig,
        weights: CurrentWeights,
        changed: StateChanged,
        launch: Callable[[], Server] | None,
    ):
        self.member, self._config, self._weights, self._changed = member, config, weights, changed
        self._launch = launch
        self.server: Server | None = None
        self.memory = ServerMemory(member.client)
        """What its process holds."""
        self.turn = asyncio.Event()
        """Unset, it is not started again: a trainer has its devices."""
        self.turn.set()
        member.gone = self.gone
        self.up = False
        """It answers, whatever its weights."""
        self.given_up = False
        self.trouble = ""
        """What it was last found to suffer from; empty while it is up."""
        self.restarts = 0
        """Times that it was started again."""
        self.updating = False
        """Its weights are being replaced: no progress is expected."""
        self._in_a_row, self._distrusted = 0, ""

    def launch(self) -> None:
        """Start the process, if it is this program's."""
        if self._launch:
            self.server = self._launch()
            self.memory.renewed()

    async def come_up(self) -> None:
        """Return when the server answers.

        Raises:
            NoRolloutCapacity: it ended, or did not answer within `start_timeout_s`.
        """
        deadline = time.monotonic() + self._config.start_timeout_s
        while self.server and not self.server.accepts():
            self.server.check()
            if time.monotonic() > deadline:
                raise NoRolloutCapacity(f"SGLang server does not answer in time: {self.server.failure_line()}")
            await asyncio.sleep(0.05)
        await self.member.client.weight_version()
        self.up, self.trouble = True, ""

    async def watch(self) -> None:
        """Look after the server until cancelled."""
        try:
            await self._watch()
        except Exception as error:
            # Nobody waits for this task: its end must show where requests wait.
            logger.exception("%s: is not watched any more", self.member.name)
            self.up, self.given_up, self.trouble = False, True, f"its watch failed: {error!r}"
            self.member.evict(self.trouble)
            self._changed.notify()

    async def _watch(self) -> None:
        while not self.given_up:
            trouble = await self._trouble()
            logger.error("%s: %s", self.member.name, trouble)
            self.up, self.trouble = False, trouble
            if self.gone():
                self.member.version = ""
            self.member.evict(trouble)
            self._changed.notify()
            await self._recover()
            self._changed.notify()

    def distrust(self, reason: str) -> None:
        """Have the server started again: nobody knows what it has."""
        self._distrusted = reason

    async def rejoin(self, first: bool = False) -> None:
        """Give the server the current weights, where that can be done from here, and let it take requests.

        Args:
            first: what it has so far is not ours, whatever it is called.
        """
        async with self._weights.lock:
            weights, client = self._weights, self.member.client
            if self.memory.given_back:
                self.member.close(TRAINERS_TURN)
                return
            if weights.doubt:
                self.member.close(f"it waits for the next update: {weights.doubt}")
                return
            self.member.version = await client.weight_version()
            foreign = first and self._launch is None
            if (foreign or self.member.version != weights.version) and weights.folder:
                await client.load_weights(str(weights.folder.resolve()), weights.version)
                self.member.version = weights.version
            if self.member.version == weights.version:
                self.member.open()
            else:
                self.member.close("it waits for the next update: only the trainer has the current weights")

    def open_if_current(self) -> None:
        """Take requests again after weights were replaced."""
        current = self.member.version == self._weights.version and not self._weights.doubt
        if self.up and current and not self.memory.given_back:
            self.member.open()

    def lost_for_good(self) -> bool:
        """Whether nothing but another update can bring it to the current weights."""
        beyond_reach = self._weights.folder is None and self.member.version != self._weights.version
        return self.given_up or beyond_reach

    async def stop(self) -> None:
        """End the process and all that it left, if it is this program's."""
        if self.server:
            await asyncio.to_thread(self.server.close)

    def gone(self) -> bool:
        """Whether its process has ended, as far as that can be seen from here."""
        return self.server is not None and self.server.process.poll() is not None

    def can_return(self) -> bool:
        """Whether the server may come back when it is down now."""
        return not self.given_up and (self.server is None or self._config.pool.restarts > 0)

    async def settled(self) -> None:
        """Return when the server answers.

        Raises:
            NoRolloutCapacity: it will not, or does not in time.
        """
        deadline = time.monotonic() + self._config.start_timeout_s + LONGEST_LOOK_S
        while not self.up or self.gone():
            if self.given_up or time.monotonic() > deadline:
                raise NoRolloutCapacity(self.trouble or f"{self.member.name}: does not answer")
            await asyncio.sleep(0.05)

    async def _trouble(self) -> str:
        """What is wrong with the server, as soon as something is."""
        progress, look_at, silence = Progress(self._config.pool.hang_timeout_s), 0.0, ""
        while True:
            if self.server and self.gone():
                return self.server.exit_reason()
            if self._distrusted:
                reason, self._distrusted = self._distrusted, ""
                return reason
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + self._config.pool.health_interval_s
                try:
                    async with asyncio.timeout(LONGEST_LOOK_S):
                        progress.seen(await self.member.client.progress())
                    silence = ""
                except (NoRolloutCapacity, TimeoutError) as error:
                    silence = str(error) or f"no reply within {LONGEST_LOOK_S:g} s"
                if self.updating:
                    progress.seen(object())
                if seconds := progress.stalled_s():
                    return f"no progress for {seconds:.0f} s {f'({silence})' if silence else ''}"
            await asyncio.sleep(min(POLL_S, self._config.pool.health_interval_s))

    async def _recover(self) -> None:
        """Get the server going again, or give it up."""
        self._in_a_row = 0 if self.member.answered else self._in_a_row
        while True:
            if self.server and self._in_a_row >= self._config.pool.restarts:
                self.given_up, self.trouble = True, f"given up after {self._in_a_row} restarts: {self.trouble}"
                await self.stop()
                self.member.close(self.trouble)
                return
            try:
                if self.server:
                    await self._start_again()
                await self.come_up()
                await self.rejoin()
                logger.warning("%s: is back", self.member.name)
                return
            except (NoRolloutCapacity, OSError) as error:
                self.trouble = str(error)
                logger.error("%s: %s", self.member.name, error)
                if not self.server:
                    await asyncio.sleep(self._config.pool.health_interval_s)

    async def _start_again(self) -> None:
        if self._in_a_row:
            await asyncio.sleep(backoff_s(self._in_a_row + 1, RESTART_PAUSE_S, LONGEST_PAUSE_S))
        self._in_a_row += 1
        self.restarts += 1
        await self.stop()
        self.member.version = ""
        self._changed.notify()
        await self.turn.wait()
        self.launch()


@contextlib.asynccontextmanager
async def watching(servers: list[SupervisedServer]) -> Any:
    """The servers are watched inside the block."""
    tasks = [asyncio.ensure_future(one.watch()) for one in servers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
