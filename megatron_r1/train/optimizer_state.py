"""The optimizer's state as shards of its parameters, so that any layout of ranks can resume from any other's.

megatron-core's distributed optimizer stores its state as flat ranges of gradient buffers, which depend on the number of
data-parallel ranks and on the other parameters in the buffer. Gathered, a parameter's moments have its shape and are
divided among ranks like the parameter itself, so they are saved and restored like weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.model.chunks import Model
from megatron_r1.model.shards import Shard, shards
from megatron_r1.train.optimizer import MOMENTS, Optimizer, ParamState

MASTER = "master"
"""fp32 copies of bf16 weights."""


@dataclass(frozen=True)
class _StateLocation:
    """Location of the state of this rank's shard of a parameter."""

    group: dist.ProcessGroup
    """The data-parallel ranks among which the state is divided."""
    ranges: list[tuple[int, int]]
    """Range of the flat parameter that each of these ranks stores, in rank order."""
    param_state: ParamState | None
    """The state that this rank stores; None where it stores none of this parameter."""


class OptimizerState:
    """Saves and restores the state of an optimizer; every method is collective over all ranks."""

    def __init__(self, model: Model, optimizer: Optimizer):
        self._model = model
        self._optimizer, self._moment_type = optimizer, optimizer.moments_dtype
        self._rests_on = optimizer.moments_device
        states = {id(entry.parameter): entry for entry in optimizer.param_states()}
        self._locations = {
            id(parameter): _StateLocation(group, ranges, states.get(id(parameter)))
            for parameter, group, ranges in optimizer.ranges()
        }

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """Kind, and a shard of a parameter with the state in place of the weight; before any update moments are 0.

        Yields only the shards that this rank owns; all ranks must iterate to the end.
        """
        for kind in (MASTER, *MOMENTS):
            for shard in shards(self._model, of=partial(self._put_together, kind)):
                if shard.owned:
                    yield kind, shard

    def load(self, read: Callable[[str, Shard], Tensor], updates: int) -> None:
        """Restore the state, one parameter after the other; what other ranks store is not read.

        Args:
            read: kind and shard of a parameter -> the saved state of it, from any layout.
            updates: number of updates in the moments.
        """
        for kind in (MASTER, *MOMENTS):
            room: dict[int, Tensor] = {}
            for shard in shards(self._model, of=partial(self._make_room, kind, room, updates)):
                shard.tensor.copy_(read(kind, shard))
            self._empty(room, kind, updates)
        if updates:
            self._optimizer.set_num_updates(updates)

    def _has(self, kind: str, parameter: Tensor) -> bool:
        return id(parameter) in self._locations and (kind != MASTER or parameter.dtype == torch.bfloat16)

    def _type(self, kind: str) -> torch.dtype:
        return torch.float32 if kind == MASTER else self._moment_type

    def _put_together(self, kind: str, parameter: Tensor) -> Tensor | None:
        """Gathered state of this rank's whole shard of a parameter; None where there is none."""
        if not self._has(kind, parameter):
            return None
        location = self._locations[id(parameter)]
        sizes = [end - start for start, end in location.ranges]
        mine_N = torch.zeros(max(sizes), dtype=self._type(kind), device=parameter.device)
        if location.param_state:
            weight_N = location.param_state.weight_N
            state = location.param_state.optimizer.state.get(weight_N, {})
            found = weight_N if kind == MASTER else state.get(kind)
            if found is not None:
                mine_N[: len(found)] = found
        everyones = [torch.empty_like(mine_N) for _ in sizes]
        dist.all_gather(everyones, mine_N, location.group)
        return torch.cat([each_N[:size] for each_N, size in zip(everyones, sizes, strict=True)]).view(parameter.shape)

    def _make_room(self, kind: str, room: dict[int, Tensor], updates: int, parameter: Tensor) -> Tensor | None:
        """Where a parameter's state is read to; that of the parameter before it has been read."""
        self._empty(room, kind, updates)
        if not self._has(kind, parameter) or not self._locations[id(parameter)].param_state:
            return None
        room[id(parameter)] = torch.empty(parameter.shape, dtype=self._type(kind), device=parameter.device)
        return room[id(parameter)]

    def _empty(self, room: dict[int, Tensor], kind: str, updates: int) -> None:
        """Restore this rank's range of what was read."""
        for key, whole in room.items():
            location = self._locations[key]
            assert location.param_state
            start, end = location.ranges[dist.get_rank(location.group)]
            self._restore(kind, location.param_state, whole.flatten()[start:end], updates)
        room.clear()

    def _restore(self, kind: str, param_state: ParamState, part_N: Tensor, updates: int) -> None:
        if kind == MASTER:
            param_state.weight_N.data.copy_(part_N)
        elif updates:
            moment_N = part_N.clone().to(self._rests_on or part_N.device)
            param_state.optimizer.state[param_state.weight_N][kind] = moment_N
