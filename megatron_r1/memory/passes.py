"""How many micro-batches' activations each chunk of a pipeline rank keeps, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul, sub

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline_stages import fitting_group_size

_TURNS = 3
"""Turns of a rank through its chunks after which what it keeps repeats itself: the warm-up is less than two."""


def warm_up_passes(
    rank: int, pipeline: int, virtual_pipeline: int = 1, group: int = 0, overlapped: bool = False
) -> int:
    """Forward passes of a pipeline rank before its first pair of a forward and a backward pass.

    Without interleaving one for each later rank. With it two for each later rank, and `group` for each chunk but one;
    where passes overlap in pairs, one more, so that the two of a pair are not of one micro-batch.

    Args:
        group: micro-batches that a chunk passes before its rank turns to the next; 0 is `pipeline`.
        overlapped: whether forward and backward passes overlap in pairs (`overlap_moe_expert_parallel_comm`).
    """
    if virtual_pipeline == 1:
        return pipeline - rank - 1
    return 2 * (pipeline - rank - 1) + (virtual_pipeline - 1) * (group or pipeline) + overlapped


def passes_at_peak(
    rank: int, parallel: ParallelConfig, micro_batches: int, sizes: Sequence[float], overlapped: bool = False
) -> tuple[int, ...]:
    """Micro-batches whose activations each chunk of a pipeline rank keeps, at a moment when they are largest.

    Args:
        rank: pipeline rank.
        micro_batches: of an optimizer step.
        sizes: bytes of one micro-batch in each chunk of the rank.
        overlapped: as of `warm_up_passes`; both passes of a pair count.
    """
    chunks, pipeline = parallel.virtual_pipeline, parallel.pipeline
    if chunks == 1:
        return (min(warm_up_passes(rank, pipeline) + 1, micro_batches),)
    group = fitting_group_size(parallel.microbatch_group_size_per_vp_stage, pipeline, micro_batches) or pipeline
    warm_up = warm_up_passes(rank, pipeline, chunks, group, overlapped)
    # Turns after the first few keep the same, but for a last one of fewer micro-batches.
    few = min(micro_batches, _TURNS * group + micro_batches % group)
    moments = _moments(_ForwardOrder(chunks, group, few), warm_up + 1)
    return max(moments, key=lambda kept: sum(map(mul, kept, sizes)))


@lru_cache(4096)
def _moments(order: _ForwardOrder, first: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches that each chunk keeps whenever a rank has turned to another one, forwards or backwards.

    In between, what is kept grows or shrinks steadily.

    Args:
        first: forward passes before a backward pass frees anything; later as many are kept at most.
    """
    first = min(first, order.passes)
    turns = {first, *(turn + behind for turn in order.turns() for behind in (0, first))}
    found = []
    for forwards in sorted(turn for turn in turns if first <= turn <= order.passes):
        # Backward passes take the chunks in reverse.
        freed = reversed(order.through(forwards - first))
        found.append(tuple(map(sub, order.through(forwards), freed)))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class _ForwardOrder:
    """Forward passes of a rank: `group` micro-batches through its first chunk, then through its second, and so on."""

    chunks: int
    group: int
    micro_batches: int

    @property
    def passes(self) -> int:
        return self.chunks * self.micro_batches

    def through(self, passes: int) -> list[int]:
        """Micro-batches through each chunk after so many passes."""
        groups, rest = divmod(passes, self.chunks * self.group)
        whole = groups * self.group
        size = min(self.group, self.micro_batches - whole)
        return [whole + min(max(rest - chunk * size, 0), size) for chunk in range(self.chunks)]

    def turns(self) -> list[int]:
        """Numbers of passes after which the rank turns to another chunk, and that of all."""
        found = [self.passes]
        for whole in range(0, self.micro_batches, self.group):
            size = min(self.group, self.micro_batches - whole)
            found += [whole * self.chunks + chunk * size for chunk in range(self.chunks)]
        return found
