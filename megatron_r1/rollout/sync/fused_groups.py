"""Groups the weights that SGLang fuses into one, and that must therefore reach it in one load.

What happens in 0.5.23 when they come in two loads:

- `q_a_proj` and `kv_a_proj_with_mqa` of a DeepSeek layer wait for each other inside one load. A half that comes alone
  is silently dropped at the load's end, and the layer keeps its old down-projections. The same holds, between
  themselves, for their FP8 block scales.
- An FP8 weight that comes without its scales is correct again when they come. In between, where DeepSeek's `kv_b_proj`
  is folded into the attention at every load that has it, the folded copies are made of new values and old scales.
- `gate_proj` and `up_proj`, and `q_proj`, `k_proj` and `v_proj`, are written to their parts of the fused weight one by
  one: nothing is lost. They are sent together all the same, so that no fused weight is half new between loads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from megatron_r1.errors import DataError
from megatron_r1.hf.fp8_blocks import SCALE_SUFFIX

_FUSED = (
    (re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa)\."), ".fused_qkv_a_proj_with_mqa."),
    (re.compile(r"\.(gate_proj|up_proj)\."), ".gate_up_proj."),
    (re.compile(r"\.(q_proj|k_proj|v_proj)\."), ".qkv_proj."),
)


class Named(Protocol):
    """Anything with a name: a tensor to send, or its entry in a plan."""

    @property
    def name(self) -> str: ...


def fused_name(name: str) -> str:
    """The name of the weight that SGLang fuses a tensor into; tensors of one such name are one group."""
    name = name.removesuffix(SCALE_SUFFIX)
    for pattern, fused in _FUSED:
        name = pattern.sub(fused, name)
    return name


class FusedGroups:
    """Collects tensors into fused groups.

    Args:
        names: Hugging Face names of all tensors that will come.
    """

    def __init__(self, names: Iterable[str]):
        self._sizes: Mapping[str, int] = Counter(map(fused_name, names))

    def collect[Tensor: Named](self, tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """The groups, each when its last tensor has come.

        Raises:
            DataError: a tensor came that is not among the names, or one that is did not come.
        """
        waiting: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            key = fused_name(tensor.name)
            group = waiting.setdefault(key, [])
            group.append(tensor)
            if len(group) > self._sizes.get(key, 0):
                raise DataError(f"{tensor.name}: is not in the plan of this sync")
            del tensor, group  # not held while the next comes
            if len(waiting[key]) == self._sizes[key]:
                yield waiting.pop(key)
        for group in waiting.values():
            raise DataError(f"{group[0].name}: the tensors that must be loaded with it did not come")
