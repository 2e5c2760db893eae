"""Several senders of one session: everyone sends in the same order, and a failure reaches them all."""

import queue
import threading

import pytest

from megatron_r1.rollout.sync.group_sender import RoundRobin, SingleSender

SENDERS = (0, 3, 5)


def run(buckets, failing=None, senders=SENDERS):
    """Send all buckets, each sender from a thread; `failing` is (sender, number). Returns the order and who failed."""
    flags = {(one, other): queue.Queue() for one in senders for other in senders}
    sent, failed, ends = [], {}, {}

    def sender(rank: int) -> None:
        order = RoundRobin(
            senders,
            buckets,
            rank,
            send_flag=lambda to, flag: flags[rank, to].put(flag),
            recv_flag=lambda of: flags[of, rank].get(timeout=10),
        )
        try:
            for number in range(order.buckets):
                with order.turn(number) as may_send:
                    if not may_send:
                        raise RuntimeError("another failed")
                    if (rank, number) == failing:
                        raise RuntimeError("failed")
                    sent.append((rank, number))
                    ends[rank, number] = order.is_last(number, number == order.buckets - 1)
        except RuntimeError as error:
            failed[rank] = str(error)
        finally:
            order.abandon()

    threads = [threading.Thread(target=sender, args=(rank,)) for rank in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(flag.empty() for flag in flags.values())
    return sent, failed, [place for place, last in ends.items() if last]


@pytest.mark.parametrize("buckets", [(1, 1, 1), (3, 1, 2), (1, 4, 1), (5, 5, 5), (1, 0, 3)])
def test_buckets_go_round(buckets):
    order, failed, last = run(buckets)
    expected = [
        (rank, n) for n in range(max(buckets)) for rank, count in zip(SENDERS, buckets, strict=True) if n < count
    ]
    assert order == expected and not failed
    assert last == [expected[-1]]


@pytest.mark.parametrize("failing", [(0, 0), (3, 1), (5, 0), (0, 2)])
def test_a_failure_ends_all_senders_that_are_not_done(failing):
    order, failed, last = run((3, 2, 4), failing)
    assert failed[failing[0]] == "failed" and not last
    whole, _, _ = run((3, 2, 4))
    assert order == whole[: whole.index(failing)]
    done = {rank for rank, count in zip(SENDERS, (3, 2, 4), strict=True) if (rank, count - 1) in order}
    assert failed.keys() == set(SENDERS) - done


def test_a_sender_that_has_the_servers_to_itself_need_not_wait():
    assert (
        SingleSender().is_last(4, True)
        and not SingleSender().is_last(4, False)
        and not SingleSender(ends_session=False).is_last(4, True)
    )
    assert RoundRobin((2,), (3,), 2).exclusive and not RoundRobin((2, 4), (3, 3), 2).exclusive
