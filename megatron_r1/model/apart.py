"""How the model is told that what it reads are several sequences, end to end."""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def sequences_apart(bounds: Tensor) -> PackedSeqParams:
    """Arguments of a forward pass whose rows are one: [1, T].

    Args:
        bounds: first token of each sequence, and T: int32 [N + 1].
    """
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
