"""How the sequences of a global batch are divided among data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence


def divide_by_tokens(lengths: Sequence[int], ranks: int, equal_counts: bool = False) -> list[list[int]]:
    """Sequences divided so that each rank has about as many tokens: the longest first, to the rank with the fewest.

    A rank's sequences come from the longest to the shortest. Every rank gets one where there are enough.

    Args:
        lengths: tokens of each sequence.
        equal_counts: whether no rank gets more sequences than its share, rounded up.
    """
    most = -(-len(lengths) // ranks) if equal_counts else len(lengths)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rank = min((rank for rank in range(ranks) if len(shares[rank]) < most), key=lambda rank: tokens[rank])
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares
