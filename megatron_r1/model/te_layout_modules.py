"""Torch modules with Transformer Engine's parameter names, shapes and sharding.

They build the model where Transformer Engine is not installed, so that a checkpoint, an export or a weight sync made
on a CPU has the layout of one made on GPUs.

Shapes: L sequence, B batch, H query heads, G key-value heads, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from megatron_r1.model.fused import grouped_linear, linear, rms_norm, swiglu
from megatron_r1.parallel.context import context_parallel_group, positions_of_rank

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Input [..., K] and weight [N, K] -> output [..., N]."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension; its gradient is summed over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(torch.nn.Module):
    """The gated feed-forward's activation."""

    def __init__(self, **_: Any):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class DuplicatedLinear(torch.nn.Module):
    """A linear map whose weight every tensor-parallel rank holds whole (TELinear with parallel_mode=duplicated)."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Any, **_: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.multiply: Multiply = linear

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.multiply(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return sharded


class _FusedProduct:
    """What megatron-core's parallel linear layers call for their product, in one node where ranks exchange nothing."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
        exchanges = ("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel")
        if bias is not None or any(how[name] for name in exchanges):
            product: Tensor = super()._forward_impl(input, weight, bias=bias, **how)  # type: ignore[misc]
            return product
        return linear(input, weight)


class FusedColumnParallelLinear(_FusedProduct, ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel linear map (TEColumnParallelLinear)."""


class FusedRowParallelLinear(_FusedProduct, RowParallelLinear):  # type: ignore[misc]
    """A row-parallel linear map (TERowParallelLinear)."""


class NormColumnParallelLinear(FusedColumnParallelLinear):
    """RMSNorm, then a column-parallel linear map (TELayerNormColumnParallelLinear)."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.eps), *args, **kwargs)


class GroupedLinear(torch.nn.Module):
    """One linear map per local expert over tokens sorted by expert (TEGroupedLinear).

    Parameters are ``weight0..N-1``, N being this rank's experts, each [output / TP, input] or [output, input / TP].

    Args:
        num_gemms: local experts.
        split_dim: dimension of each weight that expert-tensor-parallel ranks share.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        split_dim: int,
        config: TransformerConfig,
        init_method: Any,
        pg_collection: Any,
        **_: Any,
    ):
        super().__init__()
        self.num_gemms, self.split_dim, self.groups = num_gemms, split_dim, pg_collection
        shape = [output_size, input_size]
        shape[split_dim] //= get_pg_size(pg_collection.expt_tp)
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype))
            init_method(weight)
            # Expert gradients are reduced over expert-data-parallel ranks only.
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim, weight.partition_stride = split_dim, 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{index}", weight)
        self.multiply: Multiply = linear

    @property
    def is_plain(self) -> bool:
        """Whether operands are multiplied as they are."""
        return self.multiply is linear

    def weights(self) -> list[Tensor]:
        """This rank's experts' weights."""
        return [getattr(self, f"weight{index}") for index in range(self.num_gemms)]

    def forward(self, x_TD: Tensor, tokens_per_expert: Any) -> tuple[Tensor, None]:
        counts = tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(tokens_per_expert)
        if self.is_plain:
            return grouped_linear(x_TD, counts, self.weights()), None
        parts = zip(x_TD.split(counts), self.weights(), strict=True)
        return torch.cat([self.multiply(part_TD, weight) for part_TD, weight in parts]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each local expert's weight as a shard of one global tensor with a leading expert axis."""
        parallel = self.groups
        first = get_pg_rank(parallel.ep) * self.num_gemms
        total = get_pg_size(parallel.ep) * self.num_gemms
        result = {}
        for index in range(self.num_gemms):
            sharded = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{index}")},
                prefix,
                {"weight": self.split_dim},
                (*sharded_offsets, (len(sharded_offsets), first + index, total)),
                tp_group=parallel.expt_tp,
                dp_cp_group=(metadata or {}).get("dp_cp_group"),
            )[f"{prefix}weight"]
            sharded.replica_id = (*sharded.replica_id[:2], get_pg_rank(parallel.expt_dp))
            result[f"{prefix}weight{index}"] = sharded
        return result


class ColumnParallelGroupedLinear(GroupedLinear):
    """Experts' first map: output features are shared out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, split_dim=0, **kwargs)


class RowParallelGroupedLinear(GroupedLinear):
    """Experts' second map: input features are shared out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, split_dim=1, **kwargs)


class CoreAttention(torch.nn.Module):
    """Scaled dot-product attention whose query-key and value widths may differ, as latent attention needs.

    Takes query [L, B, H, D_qk], key [L, B, G, D_qk] and value [L, B, G, D_v]; returns [L, B, H * D_v]. G is H, or
    divides it where several query heads share a key-value head. Values may end in zeros up to D_qk: torch has a kernel
    that never holds the scores of all pairs, for equal widths only. A boolean mask [B, 1, L_query, L_key], true where
    attention is forbidden, replaces the causal one. Packed sequences are concatenated, without a batch dimension, and
    each attends to itself alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        v_channels: int | None = None,
        **_: Any,
    ):
        super().__init__()
        self.value_width = v_channels
        self.softmax_scale = softmax_scale
        self.sharing = config.context_parallel_size

    def _of_all_ranks(self, x_BHLD: Tensor) -> Tensor:
        """The positions of all context-parallel ranks, rank by rank; gradients go back to whose they are."""
        group = context_parallel_group()
        x_LBHD: Tensor = gather_from_sequence_parallel_region(x_BHLD.permute(2, 0, 1, 3).contiguous(), group=group)
        return x_LBHD.permute(1, 2, 0, 3)

    def _beyond(self, share: int) -> Tensor:
        """What this rank's positions must not see of all ranks': those after them, [share, share * ranks]."""
        of_rank_L = [positions_of_rank(share * self.sharing, rank, self.sharing) for rank in range(self.sharing)]
        mine_L = of_rank_L[dist.get_rank(context_parallel_group())]
        return torch.cat(of_rank_L)[None, :] > mine_L[:, None]

    def _packed(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, bounds: Tensor) -> Tensor:
        """Causal attention inside each of the sequences that lie end to end: [T, H * D_v].

        One after another, on views: nothing is padded or copied. Rows of similar lengths, padded, are only faster where
        sequences have some ten tokens.
        """
        if self.sharing > 1:
            raise ValueError("context parallelism: on a CPU packed sequences cannot share a context-parallel group")
        lengths = bounds.diff().tolist()
        sequences = zip(*(x_THD.split(lengths) for x_THD in (query_THD, key_TGD, value_TGD)), strict=True)
        outputs = [self._attend(*(x_LHD.transpose(0, 1)[None] for x_LHD in one), is_causal=True) for one in sequences]
        return torch.cat([out_1HLD[0].transpose(0, 1) for out_1HLD in outputs]).flatten(1)

    def _attend(self, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, **mask: Any) -> Tensor:
        """[B, H, L, D_v]; narrower values are padded: only for equal widths torch never holds L x L probabilities."""
        lacking = query_BHLD.shape[-1] - value_BGLD.shape[-1]
        if lacking > 0:
            return self._attend(query_BHLD, key_BGLD, F.pad(value_BGLD, (0, lacking)), **mask)[..., :-lacking]
        return F.scaled_dot_product_attention(
            query_BHLD,
            key_BGLD,
            value_BGLD,
            **mask,
            scale=self.softmax_scale,
            enable_gqa=key_BGLD.shape[1] != query_BHLD.shape[1],
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q)
        query_BHLD, key_BHLD, value_BHLD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        causal = attention_mask is None and attn_mask_type != AttnMaskType.no_mask
        if self.sharing > 1:
            if not causal:
                raise ValueError("context parallelism: on a CPU attention must be causal")
            key_BHLD, value_BHLD = (self._of_all_ranks(x_BHLD) for x_BHLD in (key_BHLD, value_BHLD))
            attention_mask, causal = self._beyond(query_BHLD.shape[2]), False
        mask = None if attention_mask is None else ~attention_mask
        out_BHLD = self._attend(query_BHLD, key_BHLD, value_BHLD, attn_mask=mask, is_causal=causal)[
            ..., : self.value_width
        ]
        return out_BHLD.permute(2, 0, 1, 3).flatten(2)
