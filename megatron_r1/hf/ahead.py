"""Results of a function that threads compute before they are asked for."""

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
    """The results for all items, in order, of which at most `threads` are computed and not asked for.

    What `function` raises is raised where its result is asked for.
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
