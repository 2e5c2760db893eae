"""Ranks wait for a rank that works without a collective operation that is pending meanwhile.

A collective operation fails on every rank that has joined it when another has not joined in time. A rollout, the start
of servers or a save may take any time, so ranks first wait for a key of the job's store, and join when the rank that
they wait for does. A thread of each rank sends heartbeats to the store, by which the others know that it is alive.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from megatron_r1.errors import ExitCode, RankLost, Requeue, Stalled, UserError
from megatron_r1.parallel import phases
from megatron_r1.parallel.behind import shown
from megatron_r1.parallel.heartbeats import (
    FAILED,
    HEARTBEAT_S,
    LEFT,
    LOOK_S,
    Beat,
    Failure,
    Heartbeats,
    heartbeat_key,
    parsed,
    within,
)

logger = logging.getLogger(__name__)

REQUESTS, SHORTEST_S = 1000, 0.02
"""Requests a second that all ranks together send to the store while they wait, and least seconds between two of one."""
TELL_S = 3 * LOOK_S
"""Seconds in which other ranks learn that one has failed."""
ANSWER_S = 6 * LOOK_S
"""Seconds that a rank has to answer a roll call, once ranks that were connected with another have lost it."""
PATIENCE_S = 15 * LOOK_S
"""The same where nothing is lost, and a signal alone says that some rank may have ended. A launcher that has sent it
for that reason kills all others 30 s later."""
FAILURES, CALLER = "failures", "caller"
"""Keys of how many ranks end by an error, and of the first that looks for one that ended without."""
NETWORK_ERRORS = ("gloo", "NCCL", "Connection", "connection", "Broken pipe")
"""One of them is in every error that a rank gets because another one has ended."""


class Waiting:
    """The ranks of one job; its methods are collective over them, each called by one thread of a rank."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        ranks: int,
        heartbeat_timeout_s: float,
        heartbeat_s: float = HEARTBEAT_S,
    ):
        """
        Args:
            store: of all ranks. A wait occupies its connection, so each thread has one of its own.
            heartbeat_timeout_s: seconds after which a rank that sends no heartbeat is lost, where no watchdog ends
                the run then.
            heartbeat_s: seconds between two heartbeats, or fewer.
        """
        self._store, self._rank, self._ranks, self._timeout_s = store.clone(), rank, ranks, heartbeat_timeout_s
        self._interval_s = min(heartbeat_s, heartbeat_timeout_s / 4)
        self.heartbeats = Heartbeats(store, rank, ranks, self._interval_s)
        self._signals = _signals
        self._keys: list[str] = []
        """Of waits that some ranks may not have left."""

    def close(self) -> None:
        """Send no more heartbeats, and say so: others that still wait for this rank wait in vain."""
        self.heartbeats.close()

    def explain(self, error: Exception) -> UserError | None:
        """Tell the other ranks of an error that ends this one; returns the error of which it is a consequence, if any.

        Only the first rank that fails has an error of its own; others get one because they miss it.
        """
        job = self.heartbeats
        if isinstance(error, Requeue):  # on all ranks
            return None
        if isinstance(error, RankLost | Stalled):
            self._let_others_learn()
            return None
        if isinstance(error, UserError) or not any(word in str(error) for word in NETWORK_ERRORS):
            self._tell_own(error)
            return None
        self._find_lost_rank()
        self._let_others_learn()
        if job.failed:
            return RankLost(job.failed.text, ExitCode(job.failed.code))
        if job.stalled:
            return Stalled(job.stalled)
        return RankLost(f"{job.keeper()} has ended") if job.gone else None

    def _let_others_learn(self) -> None:
        """This rank may keep the store, without which others do not learn what they lack."""
        if self._rank == 0:
            time.sleep(2 * LOOK_S)

    def _tell_own(self, error: Exception) -> None:
        """Tell of an error of this rank's own, which others may have too: then nobody waits."""
        job, known = self.heartbeats, isinstance(error, UserError)
        where = phases.place_of(error) or phases.current().place
        what = " ".join(str(error).split()) if known else _line(error)
        own = f"rank {self._rank} on {socket.gethostname()} failed {where}: {what}"
        if not known:
            logger.error("%s", own)
        failure = Failure(own, error.exit_code if isinstance(error, UserError) else ExitCode.REQUEUE).encoded()
        first = within(TELL_S, partial(job.first, FAILED, failure)) == failure
        number = within(TELL_S, partial(job.count, FAILURES))
        until = time.monotonic() + TELL_S
        while first and number != self._ranks and not job.gone and time.monotonic() < until:
            time.sleep(LOOK_S / 4)
            number = within(TELL_S, partial(job.count, FAILURES, 0))

    def _find_lost_rank(self) -> None:
        """After an error of the network: which rank has ended. The first rank that asks this tells the others."""
        job, until = self.heartbeats, time.monotonic() + ANSWER_S + TELL_S
        looks = within(TELL_S, partial(job.first, CALLER, str(self._rank))) == str(self._rank)
        number = within(TELL_S, job.call) if looks else None
        answers_until = time.monotonic() + ANSWER_S
        while not (job.failed or job.stalled or job.gone) and time.monotonic() < until:
            if number and time.monotonic() > answers_until:
                beats = within(TELL_S, job.everyone) or {}
                others = beats.keys() - {self._rank}
                silent = {rank: beats[rank] for rank in sorted(others) if beats[rank].answered_call < number}
                if silent:
                    why = "without an error of its own, as a process does that is killed"
                    self._tell_lost(f"{_named(silent)} ended {why}", silent)
                number = None
            time.sleep(LOOK_S / 4)

    def _tell_lost(self, text: str, lost: Mapping[int, Beat]) -> None:
        last = next(iter(lost.values())).place
        failure = Failure(f"{text}; the last heartbeat was {last}", ExitCode.REQUEUE)
        within(TELL_S, partial(self.heartbeats.first, FAILED, failure.encoded()))

    def for_rank(self, rank: int) -> None:
        """Return when `rank` has called this too.

        Raises:
            RankLost: it sends no heartbeat.
        """
        key = self._next_key()
        if rank == self._rank:
            self._store.set(key, "")
        else:
            self._wait(key, [rank])

    def for_all(self) -> None:
        """Return when all ranks have called this.

        Raises:
            RankLost: one sends no heartbeat; rank 0 watches all others, and they watch rank 0.
        """
        left, self._keys = self._keys, []  # by all that come here
        key = self._next_key()
        self._keys.append(f"{key}/ranks")
        if self._store.add(f"{key}/ranks", 1) == self._ranks:
            self._store.set(key, "")
        else:
            self._wait(key, range(1, self._ranks) if self._rank == 0 else [0])
        for old in left if self._rank == 0 else ():
            self._store.delete_key(old)

    def _next_key(self) -> str:
        self.heartbeats.waits += 1
        self._keys.append(f"wait/{self.heartbeats.waits}")
        return self._keys[-1]

    def _wait(self, key: str, ranks: Iterable[int]) -> None:
        self.heartbeats.waiting = True
        try:
            self._wait_while_alive(key, ranks)
        finally:
            self.heartbeats.waiting = False

    def _wait_while_alive(self, key: str, ranks: Iterable[int]) -> None:
        last = {rank: (b"", time.monotonic()) for rank in ranks}  # heartbeat, and when it came
        call, called, looked = 0, 0.0, float("-inf")
        while not self._is_set_soon(key, looked < 0):
            if failed := self.heartbeats.failed:
                raise RankLost(failed.text, ExitCode(failed.code))
            now = time.monotonic()
            if self._signals != _signals:
                self._signals = _signals
                call, called = self.heartbeats.call(), now
            if now < looked + self._interval_s and not call:
                continue
            looked = now
            beats = dict(zip(last, self._store.multi_get([heartbeat_key(rank) for rank in last]), strict=True))
            for rank, heartbeat in beats.items():
                before, since = last[rank]
                if heartbeat == LEFT and not self._store.check([key]):  # it may have set it before it left
                    raise RankLost(_ended(rank, before))
                if heartbeat != before:
                    last[rank] = heartbeat, now
                elif now - since > self._timeout_s and not self.heartbeats.watched:
                    raise RankLost(silent(rank, now - since, before))
            if call:
                call = self._answered(call, now - called, beats)

    def _answered(self, call: int, seconds: float, heartbeats: Mapping[int, bytes]) -> int:
        """0 once all these ranks have answered a roll call, before then its number."""
        living = {rank: parsed(heartbeat) for rank, heartbeat in heartbeats.items() if heartbeat != LEFT}
        missing = {rank: beat for rank, beat in living.items() if beat.answered_call < call}
        if missing and seconds > PATIENCE_S:
            self._tell_lost(f"{_named(missing)} gave no sign of life for {seconds:.0f} s after a signal", missing)
        return call if missing else 0

    def _is_set_soon(self, key: str, first: bool) -> bool:
        """Wait a moment for a key, and see whether it is set.

        A wait of the store costs one request, returns at once, and is quiet where the key comes within its time; no
        signal interrupts it. So a longer wait is one of many short ones.
        """
        if not first:
            time.sleep(min(LOOK_S, max(SHORTEST_S, self._ranks / REQUESTS)))
            return bool(self._store.check([key]))
        try:
            self._store.wait([key], timedelta(seconds=min(LOOK_S, self._interval_s)))
        except dist.DistStoreError:  # the time is over
            return False
        return True


_signals = 0
"""How many signals this process has received that may mean that another rank has ended."""


def note_signal() -> None:
    """A signal has come, which a launcher may have sent because another rank has ended: where this rank waits for one,
    it makes sure that it lives. For signal handlers."""
    global _signals
    _signals += 1


def _named(ranks: Mapping[int, Beat]) -> str:
    """Ranks and their host, or that of the first."""
    return f"{shown(ranks)} on {next(iter(ranks.values())).host}"


def silent(rank: int, seconds: float, last: bytes) -> str:
    """Of a rank without heartbeats, for a message."""
    beat = parsed(last)
    return f"rank {rank} on {beat.host} has sent no heartbeat for {seconds:.0f} s; the last one was {beat.place}"


def _ended(rank: int, last: bytes) -> str:
    if last in (b"", LEFT):
        return f"rank {rank} has ended"
    beat = parsed(last)
    return f"rank {rank} on {beat.host} has ended; its last heartbeat was {beat.place}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


_job: list[Waiting] = []
_jobs = 0


@contextmanager
def waiting(
    store: dist.Store | None, rank: int, ranks: int, heartbeat_timeout_s: float, heartbeat_s: float = HEARTBEAT_S
) -> Iterator[None]:
    """Meanwhile `wait_for_rank` and `wait_for_all` are of these ranks; None, the store of a single rank, has none.

    Arguments as of `Waiting`.

    Raises:
        RankLost: in the place of an error of the network that another rank's failure has caused.
        Stalled: in the place of one that the end of a run that hangs has caused.
    """
    global _jobs
    if store is None:
        yield
        return
    _jobs += 1  # a store may outlive a job, and has its keys
    prefixed = dist.PrefixStore(f"megatron_r1/{_jobs}", store)
    job = Waiting(prefixed, rank, ranks, heartbeat_timeout_s, heartbeat_s)
    _job.append(job)
    try:
        yield
    except Exception as error:
        if cause := job.explain(error):
            raise cause from error
        raise
    finally:
        _job.pop()
        job.close()


def heartbeats() -> Heartbeats | None:
    """This process's heartbeats; None before it has joined a job of several ranks, and after."""
    return _job[-1].heartbeats if _job else None


def wait_for_rank(rank: int) -> None:
    """Collective: return when `rank` has called this too; raises as of `Waiting`."""
    for job in _job[-1:]:
        job.for_rank(rank)


def wait_for_all() -> None:
    """Collective: return when all ranks have called this; raises as of `Waiting`."""
    for job in _job[-1:]:
        job.for_all()
