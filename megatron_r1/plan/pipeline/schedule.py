"""What a pipeline schedule is: for each rank, the passes that it runs, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]
Route = tuple[tuple[int, int], ...]
"""(rank, chunk) of each stage, first to last."""


class ChunkPass(NamedTuple):
    """One micro-batch through one chunk of the model, forwards or backwards."""

    kind: Kind
    """`backward` computes the gradients of inputs and weights; the two others one of them."""
    micro_batch: int
    chunk: int
    """Number of the chunk on its rank."""
    paired: bool = False
    """It overlaps with the next pass of its rank: a forward pass beside a backward pass, which end together."""


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The passes of each pipeline rank in one optimizer step, and the way that micro-batches take."""

    name: str
    micro_batches: int
    routes: tuple[Route, ...]
    """One for each direction: with two, the first half of the micro-batches take the first."""
    order: tuple[tuple[ChunkPass, ...], ...]
    """Of each rank."""

    @property
    def ranks(self) -> int:
        return len(self.order)

    @property
    def stages(self) -> int:
        return len(self.routes[0])

    def direction(self, micro_batch: int) -> int:
        """Which route a micro-batch takes."""
        return micro_batch * len(self.routes) // self.micro_batches

    def stage_of(self) -> dict[tuple[int, int, int], int]:
        """(direction, rank, chunk) -> stage."""
        return {
            (direction, rank, chunk): stage
            for direction, route in enumerate(self.routes)
            for stage, (rank, chunk) in enumerate(route)
        }


def interleaved_route(ranks: int, chunks: int) -> Route:
    """Stage s is chunk s // ranks of rank s % ranks, as megatron-core numbers them."""
    return tuple((stage % ranks, stage // ranks) for stage in range(ranks * chunks))


def peak_passes(schedule: Schedule, sizes: Sequence[Sequence[float]] | None = None) -> list[list[int]]:
    """For each rank, the micro-batches whose activations each chunk keeps when the rank keeps the most.

    A pass keeps them from its start until the gradients of its weights are computed.

    Args:
        sizes: for each rank, bytes of one micro-batch in each chunk, equal where not given; the first moment with the
            most bytes counts.
    """
    return [
        _peak(passes, sizes[rank] if sizes is not None else [1.0] * (1 + max(each.chunk for each in passes)))
        for rank, passes in enumerate(schedule.order)
    ]


def _peak(passes: Sequence[ChunkPass], sizes: Sequence[float]) -> list[int]:
    kept, peak, now, most = [0] * len(sizes), [0] * len(sizes), 0.0, 0.0
    for each in passes:
        if each.kind == "backward_input":
            continue
        change = 1 if each.kind == "forward" else -1
        kept[each.chunk] += change
        now += change * sizes[each.chunk]
        if now > most:
            most, peak = now, [*kept]
    return peak
