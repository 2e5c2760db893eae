"""Two ranks of a checkpoint store as two threads of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class ThreadRanks:
    """Two ranks as two threads."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier):
        self.rank, self.size, self.values, self.barrier = rank, len(values), values, barrier

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(timeout=10)
        values = list(self.values)
        self.barrier.wait(timeout=10)
        return values


def on_two_ranks(function: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What a function gives on each rank, or the error that it raises there."""
    barrier = threading.Barrier(2)
    values: list[Any] = [None, None]
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRanks(rank, values, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return results
