"""The order of passes in the pipeline schedules that are in use, from megatron-core's to DeepSeek's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_r1.memory.passes import warm_up_passes
from megatron_r1.plan.pipeline.schedule import ChunkPass, Kind, Route, Schedule, interleaved_route


@dataclass(frozen=True, slots=True)
class ScheduleShape:
    """A schedule by its name and sizes."""

    name: str
    """1f1b, interleaved, zb1p or dualpipe."""
    pipeline: int
    """Ranks."""
    micro_batches: int
    virtual_pipeline: int = 1
    """Chunks of each rank, of `interleaved` alone."""
    group: int = 0
    """Micro-batches that a chunk passes before its rank turns to the next; 0 is `pipeline`. Of `interleaved` alone."""
    overlapped: bool = False
    """Whether forward and backward passes overlap in pairs (`overlap_moe_expert_parallel_comm`), in `interleaved`."""

    def __post_init__(self) -> None:
        if self.name not in ORDERS:
            raise ValueError(f"no pipeline schedule {self.name}: it must be one of {', '.join(ORDERS)}")
        if self.virtual_pipeline > 1 and self.name != "interleaved":
            raise ValueError(f"{self.name} has one chunk a rank, not {self.virtual_pipeline}")
        if self.name == "dualpipe" and (self.pipeline % 2 or self.micro_batches % 2 or self.half < self.pipeline):
            raise ValueError("dualpipe needs an even number of ranks, and of micro-batches at least two for each rank")

    @property
    def half(self) -> int:
        """Micro-batches of each of two directions."""
        return self.micro_batches // 2

    @property
    def period(self) -> int:
        """Micro-batches after which the order of passes repeats."""
        return {"interleaved": self.group or self.pipeline, "dualpipe": 2}.get(self.name, 1)

    def with_micro_batches(self, micro_batches: int) -> ScheduleShape:
        return replace(self, micro_batches=micro_batches)


@lru_cache(16)
def build_schedule(shape: ScheduleShape) -> Schedule:
    """The schedule of that shape."""
    ranks = shape.pipeline
    routes: tuple[Route, ...] = (interleaved_route(ranks, shape.virtual_pipeline),)
    if shape.name == "dualpipe":
        routes = (tuple((rank, 0) for rank in range(ranks)), tuple((rank, 1) for rank in reversed(range(ranks))))
    order = ORDERS[shape.name]
    return Schedule(shape.name, shape.micro_batches, routes, tuple(tuple(order(shape, r)) for r in range(ranks)))


def one_f_one_b(shape: ScheduleShape, rank: int) -> Iterator[ChunkPass]:
    """A forward pass for each later rank, then one forward and one backward pass in turn (PipeDream-Flush)."""
    warm_up = min(warm_up_passes(rank, shape.pipeline), shape.micro_batches)
    forward = [ChunkPass("forward", number, 0) for number in range(shape.micro_batches)]
    backward = [ChunkPass("backward", number, 0) for number in range(shape.micro_batches)]
    return _in_turn(forward, backward, warm_up)


def interleaved(shape: ScheduleShape, rank: int) -> Iterator[ChunkPass]:
    """megatron-core's interleaved 1F1B: `group` micro-batches through the first chunk, then through the second, ...

    Backwards the chunks come in reverse.
    """
    if shape.virtual_pipeline == 1:
        return one_f_one_b(shape, rank)
    chunks, group = shape.virtual_pipeline, shape.group or shape.pipeline
    warm_up = warm_up_passes(rank, shape.pipeline, chunks, group, shape.overlapped)
    table = _table(shape.micro_batches, chunks, group)
    forward = [ChunkPass("forward", number, chunk, shape.overlapped) for number, chunk in table]
    backward = [ChunkPass("backward", number, chunks - 1 - chunk) for number, chunk in table]
    return _in_turn(forward, backward, min(warm_up, len(table)))


def zb1p(shape: ScheduleShape, rank: int) -> Iterator[ChunkPass]:
    """1F1B whose weight gradients wait: on rank r for r further backward passes (zero bubble, ZB-H1, section 2.3).

    Every rank keeps the activations of as many micro-batches as there are ranks, as 1F1B's first does.
    """
    forwards = iter(range(shape.micro_batches))
    for _, number in zip(range(shape.pipeline - rank), forwards, strict=False):
        yield ChunkPass("forward", number, 0)
    for number in range(shape.micro_batches):
        yield ChunkPass("backward_input", number, 0)
        if number >= rank:
            yield ChunkPass("backward_weight", number - rank, 0)
        following = next(forwards, None)
        if following is not None:
            yield ChunkPass("forward", following, 0)
    for number in range(max(0, shape.micro_batches - rank), shape.micro_batches):
        yield ChunkPass("backward_weight", number, 0)


def dualpipe(shape: ScheduleShape, rank: int) -> Iterator[ChunkPass]:
    """DeepSeek-V3's DualPipe: micro-batches enter at both ends, and forward and backward passes overlap in pairs.

    Chunk 0 of a rank is its stage of the first direction, chunk 1 its stage of the second. The eight parts of a rank's
    order are those of DeepSeek's open implementation (DualPipe.step).
    """
    outer = min(rank, shape.pipeline - 1 - rank)  # ranks between this and the nearer end
    inner = shape.pipeline // 2 - 1 - outer  # ranks between this and the middle
    own = int(rank >= shape.pipeline // 2)  # the direction of the nearer end, which reaches this rank first
    other = 1 - own
    rest = _NextPasses(shape.half)
    for _ in range(2 * inner):
        yield rest.forward(own)
    for _ in range(outer + 1):
        yield from (rest.forward(own), rest.forward(other))
    for _ in range(inner):
        yield from (rest.backward(other, split=True), rest.weight(), rest.forward(other))
    for number in range(shape.half - shape.pipeline + outer + 1):
        # The middle ranks' first two do not overlap: the backward pass would wait for the forward pass of its pair.
        yield from (rest.forward(own, paired=bool(number or inner)), rest.backward(other))
        yield from (rest.forward(other, paired=True), rest.backward(own))
    for _ in range(inner):
        yield rest.backward(other)
        yield from (rest.forward(other, paired=True), rest.backward(own))
    for number in range(2 * (outer + 1)):
        yield rest.backward(own if number % 2 else other, split=number > outer)
    for _ in range(inner):
        yield from (rest.weight(), rest.backward(own, split=True))
    for _ in range(outer + 1):
        yield rest.weight()


class _NextPasses:
    """Which micro-batch of each direction is next."""

    def __init__(self, half: int) -> None:
        self._forwards, self._backwards = [0, half], [0, half]
        self._weights: deque[tuple[int, int]] = deque()

    def forward(self, direction: int, paired: bool = False) -> ChunkPass:
        return ChunkPass("forward", self._next(self._forwards, direction), direction, paired)

    def backward(self, direction: int, split: bool = False) -> ChunkPass:
        number = self._next(self._backwards, direction)
        kind: Kind = "backward"
        if split:
            kind = "backward_input"
            self._weights.append((number, direction))
        return ChunkPass(kind, number, direction)

    def weight(self) -> ChunkPass:
        return ChunkPass("backward_weight", *self._weights.popleft())

    @staticmethod
    def _next(numbers: list[int], direction: int) -> int:
        numbers[direction] += 1
        return numbers[direction] - 1


def _in_turn(forward: list[ChunkPass], backward: list[ChunkPass], warm_up: int) -> Iterator[ChunkPass]:
    """Forward passes of the warm-up, then pairs of a forward and a backward pass, then the other backward passes."""
    for each in forward[:warm_up]:
        yield each._replace(paired=False)
    for pair in zip(forward[warm_up:], backward, strict=False):
        yield from pair
    yield from backward[len(forward) - warm_up :]


def _table(micro_batches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in the order of forward passes."""
    return [
        (number, chunk)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for number in range(first, min(first + group, micro_batches))
    ]


ORDERS: dict[str, Callable[[ScheduleShape, int], Iterator[ChunkPass]]] = {
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
}
