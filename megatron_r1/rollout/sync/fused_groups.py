"""Which weights SGLang keeps as one, and so which must reach it in one load.

What happens in 0.5.23 when they come in two loads:

- `q_a_proj` and `kv_a_proj_with_mqa` of a DeepSeek layer wait for each other inside one load. A half that comes alone
  is dropped at the load's end without a word, and the layer keeps its old down-projections. The same holds, between
  themselves, for their FP8 block scales.
- An FP8 weight that comes without its scales is right again when they come. In between, where DeepSeek's `kv_b_proj` is
  folded into the attention at every load that has it, the folded copies are made of new numbers and old scales.
- `gate_proj` and `up_proj`, and `q_proj`, `k_proj` and `v_proj`, are written to their places in the joined weight one
  by one: nothing is lost. They are kept together all the same, so that no joined weight is half new between loads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from megatron_r1.errors import DataError
from megatron_r1.hf.fp8_blocks import SCALE_SUFFIX

_JOINED = (
    (re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa)\."), ".fused_qkv_a_proj_with_mqa."),
    (re.compile(r"\.(gate_proj|up_proj)\."), ".gate_up_proj."),
    (re.compile(r"\.(q_proj|k_proj|v_proj)\."), ".qkv_proj."),
)


class Named(Protocol):
    """Anything with a name: a tensor to send, or what is known of one beforehand."""

    @property
    def name(self) -> str: ...


def joined_name(name: str) -> str:
    """The name of what SGLang joins a tensor into; tensors of one such name belong together."""
    name = name.removesuffix(SCALE_SUFFIX)
    for pattern, joined in _JOINED:
        name = pattern.sub(joined, name)
    return name


class FusedGroups:
    """Puts together what belongs together.

    Args:
        names: every tensor that will come, by its Hugging Face name.
    """

    def __init__(self, names: Iterable[str]):
        self._sizes: Mapping[str, int] = Counter(map(joined_name, names))

    def of[Tensor: Named](self, tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Lists of tensors that belong together, each when its last tensor has come.

        Raises:
            DataError: a tensor came that was not announced, or one that was did not come.
        """
        waiting: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            key = joined_name(tensor.name)
            unit = waiting.setdefault(key, [])
            unit.append(tensor)
            if len(unit) > self._sizes.get(key, 0):
                raise DataError(f"{tensor.name}: was not to be sent")
            del tensor, unit  # not held while the next comes
            if len(waiting[key]) == self._sizes[key]:
                yield waiting.pop(key)
        for unit in waiting.values():
            raise DataError(f"{unit[0].name}: what is loaded together with it did not come")
