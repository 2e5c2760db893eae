"""Runs a pipeline schedule event by event: when each pass begins and ends, and how long ranks wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.plan.pipeline.graph import PassCost, PassGraph, dependency_graph
from megatron_r1.plan.pipeline.schedule import Kind, Schedule


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of a pass through each stage, first stage to last, and of sending between ranks."""

    forward: Sequence[float]
    backward_input: Sequence[float]
    """Computing the gradients of a stage's inputs, with what is recomputed for it."""
    backward_weight: Sequence[float]
    """Computing those of its weights; a whole backward pass takes both."""
    p2p: float = 0.0
    """Seconds from the end of a pass until another rank has its result."""
    p2p_overlaps: bool = True
    """Whether a rank computes while it sends; else it first sends, with what ends together sent together."""
    overlap_saves: Sequence[float] = ()
    """Seconds that a forward pass of each stage takes less beside a backward pass than one after the other; empty is
    none."""

    @classmethod
    def equal(
        cls, stages: int, forward: float, backward_input: float, backward_weight: float, p2p: float = 0.0
    ) -> Durations:
        """The same for every stage."""
        return cls([forward] * stages, [backward_input] * stages, [backward_weight] * stages, p2p)

    def of(self, cost: PassCost) -> float:
        """Seconds of computing."""
        seconds = sum(self._of_pass(kind, stage) for kind, stage in zip(cost.kinds, cost.stages, strict=True))
        saved = self.overlap_saves[cost.stages[0]] if len(cost.kinds) > 1 and self.overlap_saves else 0.0
        return seconds - saved

    def _of_pass(self, kind: str, stage: int) -> float:
        if kind == "forward":
            return self.forward[stage]
        inputs = self.backward_input[stage] if kind != "backward_weight" else 0.0
        return inputs + (self.backward_weight[stage] if kind != "backward_input" else 0.0)


@dataclass(frozen=True, slots=True)
class PassEvent:
    """A pass of a rank, in seconds since the beginning of the step."""

    rank: int
    kind: Kind
    micro_batch: int
    chunk: int
    start: float
    end: float
    paired: bool = False
    """One of two passes that overlap; both have the same start and end."""


@dataclass(frozen=True)
class Timeline:
    """When each pass of a schedule runs."""

    schedule: Schedule
    seconds: float
    """From the first pass to the end of the last."""
    busy: list[float]
    """Seconds that each rank computes."""
    ends: list[float]
    """Of each node of the schedule's graph, with what it sends where sending does not overlap."""
    costs: list[float]
    """Seconds of computing of each of the graph's costs."""
    graph: PassGraph
    sending: list[float]
    """Seconds that each of the costs sends without computing."""

    @property
    def idle(self) -> list[float]:
        """Seconds that each rank does not compute: the bubble, and what it waits for messages."""
        return [self.seconds - busy for busy in self.busy]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they do not compute."""
        return sum(self.idle) / (self.seconds * len(self.busy)) if self.seconds else 0.0

    @cached_property
    def events(self) -> list[PassEvent]:
        """All passes, rank by rank, in their order."""
        return [event for rank in range(self.schedule.ranks) for event in self.of_rank(rank)]

    def of_rank(self, rank: int) -> list[PassEvent]:
        """The passes of a rank, in their order."""
        found: list[PassEvent] = []
        second = False
        for each, node in zip(self.schedule.order[rank], self.graph.node_of[rank], strict=True):
            cost = self.graph.cost[node]
            end = self.ends[node] - self.sending[cost]
            start, paired = end - self.costs[cost], each.paired or second
            found.append(PassEvent(rank, each.kind, each.micro_batch, each.chunk, start, end, paired))
            second = each.paired
        return found


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """Run a schedule: each pass begins when its rank is free and what it needs has arrived.

    Raises:
        ScheduleDeadlock: some ranks would wait for ever.
    """
    graph = dependency_graph(schedule)
    costs = [durations.of(cost) for cost in graph.costs]
    sending = [0.0 if durations.p2p_overlaps else durations.p2p * cost.sends for cost in graph.costs]
    blocked = [seconds + sent for seconds, sent in zip(costs, sending, strict=True)]
    delay = (0.0, durations.p2p if durations.p2p_overlaps else 0.0)
    ends: list[float] = []
    append = ends.append
    append(0.0)
    columns = zip(graph.before[1:], graph.needs[1:], graph.receives[1:], graph.cost[1:], strict=True)
    for before, needs, received, cost in columns:
        free, arrived = ends[before], ends[needs] + delay[received]
        append((free if free > arrived else arrived) + blocked[cost])
    busy = [sum(costs[cost] * amount for cost, amount in amounts.items()) for amounts in graph.amounts]
    return Timeline(schedule, max(ends), busy, ends, costs, graph, sending)
