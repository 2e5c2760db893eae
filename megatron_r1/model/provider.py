"""Which module stands for what: megatron-core's backend interface, filled with torch modules."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules
from torch import Tensor

from megatron_r1.model.fused import cross_entropy
from megatron_r1.model.one_rank_experts import GroupedFeedForward
from megatron_r1.model.te_layout_modules import (
    ColumnParallelGroupedLinear,
    CoreAttention,
    DuplicatedLinear,
    FusedColumnParallelLinear,
    FusedRowParallelLinear,
    NormColumnParallelLinear,
    RMSNorm,
    RowParallelGroupedLinear,
    SwiGLU,
)


class TorchSpecProvider(BackendSpecProvider):  # type: ignore[misc]
    """Torch modules in Transformer Engine's layout."""

    def linear(self) -> type:
        return DuplicatedLinear

    def column_parallel_linear(self) -> Any:
        return FusedColumnParallelLinear

    def row_parallel_linear(self) -> Any:
        return FusedRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        experts = GroupedMLPSubmodules(
            linear_fc1=ColumnParallelGroupedLinear, activation_func=SwiGLU, linear_fc2=RowParallelGroupedLinear
        )
        return partial(GroupedFeedForward, submodules=experts)

    def activation_func(self) -> type:
        return SwiGLU


def adopt_torch_modules() -> None:
    """Let megatron-core build its Transformer Engine layout from the modules above.

    Without Transformer Engine some of megatron-core's modules hold placeholders in its place; latent attention
    recognises the duplicated linear map by identity, and the three lookups of the provider are by module name.
    """
    from megatron.core.models.common.language_module import language_module
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import mla_qk_norm_config, multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    class Absent:
        """A class that nothing is an instance of."""

    class NoFp8:
        """The state of Transformer Engine's FP8 where there is none."""

        @staticmethod
        def is_fp8_enabled() -> bool:
            return False

    gpt_layer_specs.TESpecProvider = TorchSpecProvider
    mla_qk_norm_config.get_backend = lambda *_, **__: TorchSpecProvider()
    multi_latent_attention.HAVE_TE = False
    multi_latent_attention.TELinear = DuplicatedLinear
    multi_latent_attention.TEColumnParallelLinear = Absent
    moe_utils.te_general_gemm = None
    language_module.te_parallel_cross_entropy = _cross_entropy
    # Recomputation asks whether Transformer Engine's FP8 is on, and wraps the second pass where it may be.
    random.FP8GlobalStateManager = NoFp8
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: nullcontext()


def _cross_entropy(logits_LBV: Tensor, targets_LB: Tensor, group: Any, _: bool) -> Tensor:
    """Cross-entropy of each target, [L, B], where tensor-parallel ranks share out the vocabulary."""
    if group.size() > 1:
        shared: Tensor = vocab_parallel_cross_entropy(logits_LBV, targets_LB, tp_group=group)
        return shared
    exact = torch.promote_types(logits_LBV.dtype, torch.float32)
    return cross_entropy(logits_LBV.to(exact).flatten(0, 1), targets_LB.flatten()).view(targets_LB.shape)
