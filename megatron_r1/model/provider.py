"""Which module stands for what: megatron-core's backend interface, filled with torch modules."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from megatron_r1.model.te_layout_modules import (
    ColumnParallelGroupedLinear,
    CoreAttention,
    DuplicatedLinear,
    NormColumnParallelLinear,
    RMSNorm,
    RowParallelGroupedLinear,
)


class TorchSpecProvider(BackendSpecProvider):  # type: ignore[misc]
    """Torch modules in Transformer Engine's layout."""

    def linear(self) -> type:
        return DuplicatedLinear

    def column_parallel_linear(self) -> Any:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> Any:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        experts = GroupedMLPSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear)
        return partial(TEGroupedMLP, submodules=experts)

    def activation_func(self) -> None:
        return None


def adopt_torch_modules() -> None:
    """Let megatron-core build its Transformer Engine layout from the modules above.

    Without Transformer Engine some of megatron-core's modules hold placeholders in its place; latent attention
    recognises the duplicated linear map by identity, and the three lookups of the provider are by module name.
    """
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
    # Recomputation asks whether Transformer Engine's FP8 is on, and wraps the second pass where it may be.
    random.FP8GlobalStateManager = NoFp8
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: nullcontext()
