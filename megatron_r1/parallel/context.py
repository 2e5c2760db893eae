"""How a sequence is divided among context-parallel ranks.

It is cut into 2N pieces for N ranks, and rank r gets pieces r and 2N-1-r, so that under a causal mask all ranks have
the same work. megatron-core and Transformer Engine divide rotary positions and attention in this way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def context_parallel_group() -> dist.ProcessGroup:
    """The ranks among which each of this rank's sequences is divided."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_context_parallel_group()
    return group


def positions_of(x_BL: Tensor) -> Tensor:
    """Each element's position in its whole sequence, int64 [B, L]."""
    return torch.arange(x_BL.shape[1], device=x_BL.device).expand_as(x_BL)


def share_of_sequence(x_BL: Tensor) -> Tensor:
    """This rank's positions of whole sequences: [B, L] -> [B, L / ranks]; L must be a multiple of twice the ranks."""
    group = context_parallel_group()
    if dist.get_world_size(group) == 1:
        return x_BL
    return x_BL[:, positions_of_rank(x_BL.shape[1], dist.get_rank(group), dist.get_world_size(group))].contiguous()


def positions_of_rank(length: int, rank: int, ranks: int) -> Tensor:
    """The positions of a rank, int64 [length / ranks], ascending."""
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])
