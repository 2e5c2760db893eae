"""Builds the tensors, names and dtypes that a weight sync sends, in the groups that must reach SGLang in one load.

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
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import DataError
from megatron_r1.hf.config import QUANTIZATION_CONFIG, SpecialTokens, hf_config
from megatron_r1.hf.export import hf_tensors
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.fp8_blocks import SCALE_SUFFIX, quantise_blocks
from megatron_r1.hf.param_mapping import ParamMapping
from megatron_r1.hf.plan import FORMATS, hf_entries
from megatron_r1.rollout.sync.buckets import NamedTensor


@dataclass(frozen=True)
class WeightPayload:
    """The weights that a sync sends of a model."""

    model: ModelConfig
    include_mtp: bool = False
    """Whether to send the multi-token prediction layers; servers that do not draft with them ignore them."""
    fp8: bool = False
    """Whether the servers hold linear layers in FP8 with block scales; this side then quantises them."""

    @cached_property
    def _rows(self) -> dict[str, ParamMapping]:
        return {mapping.native: mapping for mapping in param_mappings(self.model, self.include_mtp)}

    @cached_property
    def _quantised(self) -> frozenset[str]:
        """Hugging Face names of the quantised weights."""
        if not self.fp8:
            return frozenset()
        return frozenset(name for mapping in self._rows.values() if mapping.quantised for name in mapping.hf)

    def names(self) -> list[str]:
        """Names of the megatron-core tensors that are sent."""
        return list(self._rows)

    def config(self, tokens: SpecialTokens) -> dict[str, Any]:
        """The config.json of a folder that holds the sent weights."""
        config = hf_config(self.model, tokens, include_mtp=self.include_mtp)
        return config | ({"quantization_config": QUANTIZATION_CONFIG} if self.fp8 else {})

    def entries(self, native: str) -> list[Entry]:
        """The tensors that are sent for a megatron-core tensor, in the order of `tensors`; empty when none is."""
        if native not in self._rows:
            return []
        precision = self.model.dtype
        return hf_entries(self._rows[native], "fp8" if self.fp8 else precision, FORMATS[precision])

    def tensors(self, natives: Iterable[tuple[str, Tensor]], complete: bool) -> Iterator[NamedTensor]:
        """Whole megatron-core tensors, converted one by one into what is sent; they stay on their device.

        Args:
            natives: (name, tensor) pairs in any order.
            complete: every tensor of the model must come; without, `natives` may be a part of them.

        Raises:
            DataError: a tensor is unknown, missing, doubled, has the wrong shape, or numbers that FP8 cannot hold.
        """
        pairs = hf_tensors(natives, self.model, include_mtp=self.include_mtp, complete=complete)
        for name, tensor in pairs:
            if name in self._quantised:
                try:
                    tensor, scales_mn = quantise_blocks(tensor)
                except ValueError as error:
                    raise DataError(f"{name}: {error}") from None
                assert scales_mn is not None
                yield NamedTensor(name, tensor)
                yield NamedTensor(name + SCALE_SUFFIX, scales_mn)
                del tensor, scales_mn
                continue
            yield NamedTensor(name, tensor)
            del tensor  # not held while the next is put together

    def groups(
        self, natives: Iterable[tuple[str, Tensor]], part: Iterable[str] | None = None
    ) -> Iterator[list[NamedTensor]]:
        """As `tensors`, in the groups that SGLang must load together.

        Args:
            part: names of the megatron-core tensors that come; None for all of the model.
        """
        names = [entry.name for native in (self.names() if part is None else part) for entry in self.entries(native)]
        return FusedGroups(names).collect(self.tensors(natives, complete=part is None))

    def planned_groups(self, natives: Iterable[str]) -> Iterator[list[Entry]]:
        """The entries of the groups that will be sent for these megatron-core tensors."""
        entries = [entry for native in natives for entry in self.entries(native)]
        return FusedGroups(entry.name for entry in entries).collect(entries)


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
