"""Divides sequences and samples into mini-batches, among data-parallel ranks, and into micro-batches.

Every sample is in exactly one mini-batch and in exactly one micro-batch of that, and equal arguments give equal
batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def divide_by_tokens(lengths: Sequence[int], ranks: int, equal_counts: bool = False) -> list[list[int]]:
    """Indices of each rank's sequences, with about equally many tokens: greedy, the longest first.

    Each sequence goes to the rank with the fewest tokens so far, so a rank's sequences are sorted from long to short.
    Every rank gets at least one where there are enough.

    Args:
        lengths: tokens of each sequence.
        equal_counts: whether every rank gets at most len(lengths) / ranks sequences, rounded up.
    """
    most = -(-len(lengths) // ranks) if equal_counts else len(lengths)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rank = min((rank for rank in range(ranks) if len(shares[rank]) < most), key=lambda rank: tokens[rank])
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


def shuffle_into_mini_batches(num_samples: int, mini_batches: int, seed: int | Sequence[int]) -> list[np.ndarray]:
    """Indices of a rollout's samples, shuffled and divided; sizes differ by at most one.

    Advantages are computed on whole groups before this, so a group may be divided among mini-batches.

    Args:
        seed: one number, or several such as (run seed, rollout, epoch).
    Raises:
        ValueError: there are fewer samples than mini-batches.
    """
    if not 1 <= mini_batches <= num_samples:
        raise ValueError(f"mini_batches={mini_batches}: must lie between 1 and the {num_samples} samples")
    return np.array_split(np.random.default_rng(seed).permutation(num_samples), mini_batches)


def micro_batches_of_ranks(lengths: Sequence[int], ranks: int, tokens_per_micro_batch: int) -> list[list[list[int]]]:
    """Each rank's micro-batches, as indices of samples: divided by tokens among the ranks, then within each rank."""
    return [
        [
            [share[index] for index in batch]
            for batch in micro_batches_by_tokens([lengths[index] for index in share], tokens_per_micro_batch)
        ]
        for share in divide_by_tokens(lengths, ranks)
    ]


def micro_batches_by_tokens(lengths: Sequence[int], tokens_per_micro_batch: int) -> list[list[int]]:
    """Indices grouped so that a group's tokens stay within the budget.

    Samples are sorted from long to short: those of a group have similar lengths, and the pass that needs most memory
    comes first. A sample that alone exceeds the budget gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens += lengths[index]
        if not batches or tokens > tokens_per_micro_batch:
            batches.append([])
            tokens = lengths[index]
        batches[-1].append(index)
    return batches
