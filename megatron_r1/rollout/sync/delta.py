"""Puts what changed in a bucket since it was last sent into bytes: a bit for every number, then the new numbers.

With bf16 weights and the learning rates of reinforcement learning most numbers round to what they were before
(tools/bench/sync_delta.py). SGLang 0.5.23 takes whole tensors only, so servers need `rollout/sglang/delta.py` for this.

Shapes: N numbers of a tensor, C of them changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.rollout.sync.buckets import Bucket

MARK = "delta"
"""Name and type of the last entry of a delta's description. It is no type of torch: a server that knows no deltas says
so before it receives anything."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Compared bit by bit: -0.0 is not 0.0, and a NaN is itself."""


def encode(entries: Sequence[Entry], now: Tensor, before: Tensor) -> tuple[list[int], Tensor] | None:
    """How many numbers of each tensor are sent, and the bytes; None where a delta cannot say what the bucket is.

    A tensor of which nothing changed takes no bytes, one that is smaller whole is sent whole. NaN stands for
    "unchanged" when a server decodes, so it cannot be sent as a number.

    Args:
        entries: of the bucket.
        now: its content, as bytes.
        before: the content that the servers have.
    """
    counts, parts, start = [], [], 0
    for entry in entries:
        end, words = start + entry.nbytes, _WORDS[entry.dtype.itemsize]
        now_N, changed_N = now[start:end].view(words), now[start:end].view(words) != before[start:end].view(words)
        changed = int(changed_N.sum())
        if changed_N.numel() == 1 or -(-changed_N.numel() // 8) + changed * words.itemsize >= entry.nbytes:
            sent_C, changed = now_N, now_N.numel()
        else:
            sent_C = now_N[changed_N]
            parts += [_packed(changed_N)] if changed else []
        if sent_C.view(entry.dtype).isnan().any():
            return None
        parts.append(sent_C.view(torch.uint8))
        counts.append(changed)
        start = end
    return counts, torch.cat(parts)


def decode(entries: Sequence[Entry], counts: Sequence[int], content: Tensor) -> Iterator[Tensor]:
    """Tensors with the new numbers, and NaN wherever nothing changed; arguments as `encode` gave them."""
    start = 0

    def take(nbytes: int) -> Tensor:
        nonlocal start
        start += nbytes
        return content[start - nbytes : start].clone()  # aligned for any type

    for entry, count in zip(entries, counts, strict=True):
        words, numel = _WORDS[entry.dtype.itemsize], prod(entry.shape)
        if count == numel:
            yield take(entry.nbytes).view(entry.dtype).view(entry.shape)
            continue
        tensor = torch.full(entry.shape, torch.nan, dtype=entry.dtype, device=content.device)
        if count:
            changed_N = _unpacked(take(-(-numel // 8)), numel)
            tensor.view(-1).view(words)[changed_N] = take(count * words.itemsize).view(words)
        yield tensor


class SentBuckets:
    """What servers have, bucket by bucket, in host memory: at first nothing.

    It is right as long as its sender alone sends these weights and no sending fails: then begin with a new one.
    """

    def __init__(self) -> None:
        self._sent: dict[int, tuple[list[Entry], Tensor]] = {}

    def message(self, number: int, bucket: Bucket) -> tuple[dict[str, Any], list[Tensor]]:
        """Description and parts that bring servers from what they have to this bucket, which they have then.

        Args:
            number: of the bucket in its sync.
        """
        described, content = bucket.description(), bucket.content
        entries, before = self._sent.get(number, ([], content))
        if entries != bucket.entries:
            self._sent[number] = (list(bucket.entries), content.cpu().clone())
            return described, bucket.parts
        found = encode(entries, content, before.to(content.device))
        before.copy_(content)
        if found is None:
            return described, bucket.parts
        counts, delta = found
        described["names"].append(MARK)
        described["dtypes"].append(MARK)
        described["shapes"].append([delta.numel(), *counts])
        return described, [delta]


def _packed(changed_N: Tensor) -> Tensor:
    """Eight to a byte, the first in the lowest bit; shape (ceil(N / 8),)."""
    padded = torch.nn.functional.pad(changed_N, (0, -changed_N.numel() % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << _BITS.to(padded.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, numel: int) -> Tensor:
    return ((packed[:, None] >> _BITS.to(packed.device)) & 1).view(-1)[:numel].bool()


_BITS = torch.arange(8, dtype=torch.uint8)
