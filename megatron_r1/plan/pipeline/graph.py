"""What each pass of a schedule waits for, which does not depend on how long passes take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from megatron_r1.plan.pipeline.schedule import Schedule

_MISSING = -1


class ScheduleDeadlock(RuntimeError):
    """Ranks of a schedule wait for one another; names every one that waits, and for what."""


class PassCost(NamedTuple):
    """What a node's seconds depend on."""

    kinds: tuple[str, ...]
    """Of its passes: one, or a forward and a backward pass that overlap; none of a node that only waits."""
    stages: tuple[int, ...]
    """Of each of its passes."""
    sends: bool
    """Whether another rank needs its result."""


NO_COST = PassCost((), (), False)


@dataclass(slots=True)
class PassGraph:
    """The passes of all ranks, each after those that it waits for; node 0 is the beginning of the step.

    A pair of passes is two nodes: the first waits for what the forward pass needs, the second stands for both passes.
    """

    before: list[int] = field(default_factory=list)
    """Node that the rank runs just before."""
    needs: list[int] = field(default_factory=list)
    """Node whose result it needs."""
    receives: list[int] = field(default_factory=list)
    """1 where that result comes from another rank."""
    cost: list[int] = field(default_factory=list)
    """Index into `costs`."""
    costs: list[PassCost] = field(default_factory=list)
    node_of: list[list[int]] = field(default_factory=list)
    """For each rank, the node of each of its passes."""
    amounts: list[Counter[int]] = field(default_factory=list)
    """For each rank, how often it has each cost."""


@lru_cache(16)
def dependency_graph(schedule: Schedule) -> PassGraph:
    """The graph of a schedule.

    Raises:
        ScheduleDeadlock: some ranks would wait for ever.
    """
    return _GraphBuilder(schedule).build()


class _PassRule(NamedTuple):
    """What holds for all passes of one kind through one chunk; offsets are into a micro-batch's results."""

    need: int
    """Of the result that it needs."""
    received: int
    """1 where another rank has it."""
    result: int
    cost: int
    """Index into the graph's costs."""


class _GraphBuilder:
    """Runs the ranks of a schedule as far as each can go, one after the other."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.row = 3 * schedule.stages + 1
        """Results of a micro-batch: its tokens, then each stage's forward, backward and weight pass."""
        self.results = [0, *[_MISSING] * (self.row - 1)] * schedule.micro_batches
        self.graph = PassGraph([0], [0], [0], [0], [NO_COST], [[] for _ in schedule.order])
        self.pairs: dict[tuple[int, int], int] = {}
        self.rules = [self._rules(rank) for rank in range(schedule.ranks)]
        self.directions = [schedule.direction(number) for number in range(schedule.micro_batches)]
        self.positions = [0] * schedule.ranks
        self.latest = [0] * schedule.ranks

    def build(self) -> PassGraph:
        while sum(self._run(rank) for rank in range(self.schedule.ranks)):
            pass
        waiting = [rank for rank, passes in enumerate(self.schedule.order) if self.positions[rank] < len(passes)]
        if waiting:
            raise ScheduleDeadlock(f"{self.schedule.name}: " + "; ".join(map(self._waits, waiting)))
        numbers = self.graph.cost
        self.graph.amounts = [Counter(numbers[node] for node in set(nodes)) for nodes in self.graph.node_of]
        return self.graph

    def _run(self, rank: int) -> bool:
        """Add the rank's passes up to the first that must wait; whether there were any."""
        passes, begin = self.schedule.order[rank], self.positions[rank]
        results, rules, directions = self.results, self.rules[rank], self.directions
        nodes, append, beside = self.graph.node_of[rank], self._append, None
        for position in range(begin, len(passes)):
            kind, micro_batch, chunk, paired = passes[position]
            need, received, result, cost = rules[kind, directions[micro_batch], chunk]
            row = micro_batch * self.row
            needed = results[row + need]
            if needed == _MISSING:
                break
            if paired:
                beside = needed, received, row + result, cost
                continue
            if beside is not None:
                append(rank, beside[0], beside[1], 0)
                results[beside[2]], cost = len(self.graph.before), self._together(beside[3], cost)
                nodes.append(results[beside[2]])
                beside = None
            results[row + result] = append(rank, needed, received, cost)
            nodes.append(results[row + result])
            self.positions[rank] = position + 1
        return self.positions[rank] > begin

    def _append(self, rank: int, needed: int, received: int, cost: int) -> int:
        graph, node = self.graph, len(self.graph.before)
        graph.before.append(self.latest[rank])
        graph.needs.append(needed)
        graph.receives.append(received)
        graph.cost.append(cost)
        self.latest[rank] = node
        return node

    def _rules(self, rank: int) -> dict[tuple[str, int, int], _PassRule]:
        """(kind, direction, chunk) -> what holds for such passes of a rank."""
        stages, rules = self.schedule.stages, {}
        for (direction, of_rank, chunk), stage in self.schedule.stage_of().items():
            if of_rank != rank:
                continue
            route = self.schedule.routes[direction]
            forward, backward, weight = 1 + stage, 1 + stages + stage, 1 + 2 * stages + stage
            earlier = stage > 0 and route[stage - 1][0] != rank  # whether another rank has the stage before
            later = stage < stages - 1 and route[stage + 1][0] != rank
            behind = backward + 1 if stage < stages - 1 else forward
            cost = self._cost(PassCost(("forward",), (stage,), later))
            rules["forward", direction, chunk] = _PassRule(stage, int(earlier), forward, cost)
            for kind in ("backward", "backward_input"):
                cost = self._cost(PassCost((kind,), (stage,), earlier))
                rules[kind, direction, chunk] = _PassRule(behind, int(later), backward, cost)
            cost = self._cost(PassCost(("backward_weight",), (stage,), False))
            rules["backward_weight", direction, chunk] = _PassRule(backward, 0, weight, cost)
        return rules

    def _cost(self, cost: PassCost) -> int:
        self.graph.costs.append(cost)
        return len(self.graph.costs) - 1

    def _together(self, forward: int, backward: int) -> int:
        """The cost of two passes that overlap."""
        if (forward, backward) not in self.pairs:
            first, second = self.graph.costs[forward], self.graph.costs[backward]
            cost = PassCost(first.kinds + second.kinds, first.stages + second.stages, first.sends or second.sends)
            self.pairs[forward, backward] = self._cost(cost)
        return self.pairs[forward, backward]

    def _waits(self, rank: int) -> str:
        """What a rank that cannot go on waits for."""
        for each in self.schedule.order[rank][self.positions[rank] :]:
            direction = self.directions[each.micro_batch]
            rule = self.rules[rank][each.kind, direction, each.chunk]
            if self.results[each.micro_batch * self.row + rule.need] == _MISSING:
                break
        part, stage = divmod(rule.need - 1, self.schedule.stages)
        owner = self.schedule.routes[direction][stage][0]
        return (
            f"rank {rank} waits before {each.kind} of micro-batch {each.micro_batch}, chunk {each.chunk}, "
            f"for rank {owner} to run its {('forward', 'backward')[part]} through stage {stage}"
        )
