"""Threads compute what is asked for next: in order, not too far ahead, and errors come where they belong."""

from __future__ import annotations

import threading

import pytest

from megatron_r1.hf.ahead import ahead


def test_results_come_in_order_and_threads_keep_a_bounded_lead() -> None:
    begun: list[int] = []
    first = threading.Event()

    def slow_first(item: int) -> int:
        begun.append(item)
        if item == 0:
            assert first.wait(20)
        return item * item

    with ahead(slow_first, range(50), threads=3) as results:
        found = []
        waiting = threading.Thread(target=lambda: found.append(next(results)))
        waiting.start()
        first.set()
        waiting.join(20)
        assert found == [0] and set(begun) <= {0, 1, 2, 3}
        for number in range(1, 50):
            assert next(results) == number * number
            assert max(begun) <= number + 3


def test_an_error_is_raised_where_its_result_is_asked_for() -> None:
    def odd(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    with ahead(odd, range(100), threads=2) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)


def test_what_nobody_asks_for_any_more_is_not_computed() -> None:
    begun: list[int] = []
    with pytest.raises(KeyboardInterrupt), ahead(begun.append, range(1000), threads=2) as results:
        next(results)
        raise KeyboardInterrupt
    assert len(begun) <= 4 and threading.active_count() < 10
