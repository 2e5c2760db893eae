"""Prefetches results of a function: threads compute the next ones while the caller uses one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

THREADS = min(4, os.cpu_count() or 1)
"""Each holds what it works on in memory."""


@contextmanager
def ahead[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> Iterator[Iterator[Result]]:
    """The results for all items, in order, of which threads compute at most `threads` ahead of the caller.

    What `function` raises is raised where the caller takes its result.
    """
    pool = ThreadPoolExecutor(threads)

    def results() -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
