"""Which ranks the others wait for, from what every rank last said of itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

from megatron_r1.parallel.heartbeats import Beat


def ranks_behind(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that work, or hang, while the others wait for them; all ranks where they do not differ.

    A rank that waits has come to a place where those that it waits for have not been yet: each rank counts the waits
    and, by process group, the collective operations that it has begun.
    """
    fewest = min(beat.waits for beat in beats.values())
    found = [rank for rank, beat in beats.items() if beat.waits == fewest]
    found = [rank for rank in found if not beats[rank].waiting] or found
    # One that is behind in a group may itself be ahead in another, and wait there for one that is behind.
    late = [rank for rank in found if _differs(rank, found, beats, -1) and not _differs(rank, found, beats, 1)]
    found = late or found
    return [rank for rank in found if not beats[rank].in_collective] or found


def _differs(rank: int, others: Iterable[int], beats: Mapping[int, Beat], sign: int) -> bool:
    """Whether a rank has begun fewer (-1) or more (1) operations in some group than another member has."""
    mine = beats[rank].collectives
    theirs = (pair for other in others for pair in beats[other].collectives.items())
    return any((mine[group] - count) * sign > 0 for group, count in theirs if group in mine)


def shown(ranks: Collection[int]) -> str:
    """Ranks for a message, such as `rank 3` or `ranks 0-2, 7`."""
    runs = [[*run] for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
