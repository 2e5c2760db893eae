"""Counter-based random numbers: addressed, not drawn one after the other.

A number depends on its seed and its counters alone (for example file, row and position), so that results do not depend
on how the work is divided among processes or where it is resumed. The mixing function is the finaliser of SplitMix64
(Steele, Lea and Flood 2014), applied once per counter.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1), one for each combination of counters.

    Args:
        seed: any whole number from 0.
        counters: whole numbers from 0 that broadcast against each other.

    Returns:
        float64 of the counters' common shape.
    """
    state = mixed(np.array(seed % 2**64, dtype=np.uint64))
    for counter in counters:
        state = mixed(state ^ mixed(np.asarray(counter).astype(np.uint64)))
    return (state >> np.uint64(11)) * 2.0**-53


def mixed(value: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        value = value + np.uint64(GOLDEN)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return np.asarray(value)
