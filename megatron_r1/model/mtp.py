"""Multi-token prediction where megatron-core's own is not exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import multi_token_prediction

_roll = multi_token_prediction.roll_tensor


def weigh_context_ranks_alike() -> None:
    """Let every predicted token count the same where context-parallel ranks share a sequence.

    megatron-core divides each rank's loss by the tokens that this rank predicts, and the rank that holds the end of the
    sequence predicts fewer. Dividing by the mean over the ranks gives the mean over the sequence (DeepSeek-V3 report,
    equation 24, but for the constant). Calling it again changes nothing.
    """
    multi_token_prediction.roll_tensor = _roll_and_count


def _roll_and_count(tensor: torch.Tensor, *args: Any, cp_group: Any = None, **kwargs: Any) -> tuple:
    rolled, count = _roll(tensor, *args, cp_group=cp_group, **kwargs)
    if cp_group is not None and cp_group.size() > 1:
        count = count.double()
        dist.all_reduce(count, group=cp_group)
        count = count / cp_group.size()
    return rolled, count
