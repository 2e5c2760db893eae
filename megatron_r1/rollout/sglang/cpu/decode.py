"""One token of attention for many sequences at once, out of a paged cache, in plain torch.

SGLang's torch_native backend goes sequence by sequence, which for small models on a CPU is more than half of the time
of decoding. Here the cached keys and values of a chunk of sequences are gathered into one padded tensor.

Shapes: B sequences, H query heads, J key-value heads, D query-key width, V value width, L longest sequence, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GATHERED_ELEMENTS = 1 << 24
"""Most numbers that the keys of one chunk of sequences may hold."""


def batched_decode(
    query_BHD: Tensor,
    keys_SJD: Tensor,
    values_SJV: Tensor,
    slots_BL: Tensor,
    lengths_B: Tensor,
    scale: float | None,
    output_BHV: Tensor,
) -> None:
    """Attention of one new token in each sequence over the whole of its sequence, written to `output_BHV`.

    Args:
        slots_BL: cache slot of each position; positions at or beyond a sequence's length are not used.
        lengths_B: positions of each sequence, the new token's own included; at least 1.
        scale: factor on the products of queries and keys; None is D ** -0.5.
    """
    B, H, _ = query_BHD.shape
    _, J, D = keys_SJD.shape
    # What lies beyond a sequence's end points to its own first slot: no sequence ever reads another's numbers.
    inside_BL = torch.arange(slots_BL.shape[1]) < lengths_B[:, None]
    slots_BL = torch.where(inside_BL, slots_BL, slots_BL[:, :1]).long()
    chunk = max(1, GATHERED_ELEMENTS // (slots_BL.shape[1] * J * D))
    for start in range(0, B, chunk):
        part = slice(start, start + chunk)
        # Heads that share a key-value head stand where query positions usually do, so nothing is copied for them.
        output = scaled_dot_product_attention(
            torch.unflatten(query_BHD[part], 1, (J, H // J)),
            keys_SJD[slots_BL[part]].transpose(1, 2).to(query_BHD.dtype),
            values_SJV[slots_BL[part]].transpose(1, 2).to(query_BHD.dtype),
            attn_mask=inside_BL[part, None, None, :],
            scale=scale,
        )
        output_BHV[part] = output.flatten(1, 2)
