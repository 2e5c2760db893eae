"""Rank and world size from the launcher's (torchrun's or srun's) environment variables, without torch."""

from __future__ import annotations

import os


def world_size() -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine; all ranks where the launcher does not set the number."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_rank_zero() -> bool:
    """Whether this is rank 0: the one that prints, writes the run folder and drives the rollout engine."""
    return rank() == 0
