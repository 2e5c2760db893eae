"""Build the model of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.config.model import AttentionConfig, ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.model.chunks import Chunks, Model, chunks
from megatron_r1.model.fp8.apply import use_fp8, wants_fp8
from megatron_r1.model.fused_latent_attention import FusedLatentAttention
from megatron_r1.model.megatron_overrides import (
    LatentAttention,
    rotate_packed_at_once,
    set_latent_norm_epsilon,
    use_deepseek_group_topk,
    use_latent_attention,
    use_llama3_rope_scaling,
)
from megatron_r1.model.mtp_loss import use_chunked_mtp_loss
from megatron_r1.model.one_rank_experts import use_one_rank_dispatch
from megatron_r1.model.provider import TorchSpecProvider, adopt_torch_modules
from megatron_r1.model.shards import initialise
from megatron_r1.model.spec import transformer_config
from megatron_r1.model.te_layout_modules import FusedColumnParallelLinear
from megatron_r1.platform import Platform


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    platform: Platform,
    seed: int,
    performance: PerformanceConfig | None = None,
    precision: Fp8Config | None = None,
) -> Model:
    """This rank's part of the model, with its initial weights: a GPTModel, or `Chunks` of them.

    Args:
        model: shape of the model.
        parallel: degrees of parallelism; process groups must exist.
        platform: decides between Transformer Engine's modules and torch's; on `meta` weights have shapes alone.
        seed: seed of the initial weights, which depend on it and on the parameter's name alone.
        performance: recomputation, overlap and fusion; None is plain.
        precision: how linear layers multiply, by default as `model.dtype` says; in FP8 the model has an `fp8_plan`.

    Raises:
        ConfigError: the platform cannot multiply as `precision` asks.
    """
    precision = precision or Fp8Config()
    fp8 = wants_fp8(precision, platform)
    if not platform.transformer_engine:
        adopt_torch_modules()
    rotate_packed_at_once()
    use_chunked_mtp_loss()
    fused = platform.transformer_engine
    config = transformer_config(model, parallel, performance or PerformanceConfig(), fused=fused, fp8=fp8 and fused)
    shapes_only = platform.device == "meta"
    with torch.device("meta") if shapes_only else nullcontext():
        if parallel.virtual_pipeline == 1:
            built: Model = _part(model, config, platform, None)
        else:
            built = Chunks([_part(model, config, platform, stage) for stage in range(parallel.virtual_pipeline)])
    if not shapes_only:
        initialise(built, model.init_std, seed)
    if fp8:
        built.fp8_plan = use_fp8(built, precision, platform)
    return built.to(platform.device)


def _part(model: ModelConfig, config: TransformerConfig, platform: Platform, stage: int | None) -> GPTModel:
    """The layers of one stage of this rank; `stage` counts the rank's own where it has several."""
    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage)
    provider = gpt_layer_specs.TESpecProvider() if platform.transformer_engine else TorchSpecProvider()
    block.layer_norm = provider.layer_norm(rms_norm=True)
    # Multi-token layers are made like the last layer, which their stage need not have.
    last = block.layer_specs or gpt_layer_specs.get_gpt_decoder_layer_specs(config, use_transformer_engine=True)
    if isinstance(model.attention, AttentionConfig):
        use_latent_attention(last, LatentAttention if platform.transformer_engine else FusedLatentAttention)
    prediction = None
    place: dict[str, Any] = {"ignore_virtual": False, "vp_stage": stage}
    layout = config.pipeline_model_parallel_layout
    if mtp_on_this_rank(layout, config.mtp_num_layers, **place):
        prediction = gpt_layer_specs.get_gpt_mtp_block_spec_for_backend(config, last[-1], provider, vp_stage=stage)
    part = GPTModel(
        config,
        block,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        position_embedding_type="rope",
        rotary_base=model.rope.base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        mtp_block_spec=prediction,
        vp_stage=stage,
    )
    if part.post_process and not platform.transformer_engine:
        part.output_layer.__class__ = FusedColumnParallelLinear
    if prediction and part.post_process and config.gradient_accumulation_fusion:
        _keep_mtp_gradient(part.output_layer.weight)
    if isinstance(model.attention, AttentionConfig):
        set_latent_norm_epsilon(part, model.attention.norm_epsilon)
    elif model.rope.factor > 1:
        use_llama3_rope_scaling(part, model.rope)
    use_deepseek_group_topk(part, model.moe)
    if not platform.transformer_engine:
        use_one_rank_dispatch(part)
    return part


def _keep_mtp_gradient(head_VD: Tensor) -> None:
    """Keep the gradient that the head gets from multi-token prediction, which does not call the output layer.

    A layer that adds its weight's gradient to the buffer itself returns one without meaning, and megatron-core drops
    with it what autograd has for this weight from elsewhere, unless the weight asks for zeros.
    """
    head_VD.zero_out_wgrad = True  # type: ignore[attr-defined]


def native_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its megatron-core name: parameters, and the routers' expert bias, which is a buffer."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            yield name, buffer.detach()


@contextmanager
def without_multi_token_prediction(model: Model) -> Iterator[None]:
    """Run only the backbone: for log-probabilities and sampling, where no extra token is predicted."""
    parts = chunks(model)
    saved = [(part.mtp_process, part.config.mtp_num_layers) for part in parts]
    for part in parts:
        part.mtp_process, part.config.mtp_num_layers = False, None
    try:
        yield
    finally:
        for part, (process, layers) in zip(parts, saved, strict=True):
            part.mtp_process, part.config.mtp_num_layers = process, layers
