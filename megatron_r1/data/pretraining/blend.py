"""Blends several sources in fixed shares.

Positions are divided into blocks. In each block every source gets a number of slots in proportion to its weight, and
the slots are shuffled. The number of the block and the slot in it determine which sequence of which source a position
reads, without regard to any other position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_r1.errors import ConfigError

BLOCK = 10_000


class Blend:
    """Maps each position to a source and a position in that source.

    Args:
        weights: one per source, above 0; their sum may be anything.
        seed: of the order inside blocks.

    Raises:
        ConfigError: a source's share is too small for one slot in a block.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        self._seed = seed
        self.slots = shares(weights, BLOCK)
        if not self.slots.all():
            least = weights[int(np.argmin(self.slots))]
            raise ConfigError("weight", least, f"must be at least {1 / BLOCK} of the sum of all weights")
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def at(self, position: int) -> tuple[int, int]:
        """Source of a position, and the position in that source."""
        block, slot = divmod(position, BLOCK)
        if self._block[0] != block:
            sources = np.repeat(np.arange(len(self.slots)), self.slots)
            np.random.default_rng([self._seed, block]).shuffle(sources)
            earlier = np.empty(BLOCK, dtype=np.int64)
            for source, count in enumerate(self.slots):
                earlier[sources == source] = np.arange(count)
            self._block = (block, sources, earlier)
        source = int(self._block[1][slot])
        return source, block * int(self.slots[source]) + int(self._block[2][slot])


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` divided by weight into whole numbers (largest remainders): int64 [sources]."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole
