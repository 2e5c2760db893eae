"""How many tokens a model takes at a time: micro-batches are padded to a multiple of this."""

from __future__ import annotations

from math import gcd

from megatron_r1.config.fp8 import GATHERED_ROWS, ROWS
from megatron_r1.model.chunks import Model


def token_multiple(model: Model, sequences: int = 1) -> int:
    """What the length of a micro-batch's sequences must be a multiple of.

    Sequence parallelism divides the positions of a sequence among tensor-parallel ranks. In FP8 Transformer Engine
    refuses products of tokens that are no multiple of 16 (the product of the weight's gradient sums over them), and
    gathers tokens in FP8, not in bf16, if every rank has a multiple of 128.

    Args:
        model: this rank's part; of torch's modules, which multiply any number of tokens, or Transformer Engine's.
        sequences: sequences of equal length in the micro-batch; 1 where they are concatenated.
    """
    ranks = int(model.config.tensor_model_parallel_size)
    rows = (GATHERED_ROWS if ranks > 1 else ROWS) if model.config.fp8 else 1
    return ranks * (rows // gcd(rows, sequences))
