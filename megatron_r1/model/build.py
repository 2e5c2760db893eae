"""Build the model of this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.precision import PrecisionConfig
from megatron_r1.errors import DataError
from megatron_r1.model.attention import use_latent_attention
from megatron_r1.model.fp8.apply import use_fp8, wants_fp8
from megatron_r1.model.provider import TorchSpecProvider, adopt_torch_modules
from megatron_r1.model.shards import initialise
from megatron_r1.model.spec import transformer_config
from megatron_r1.platform import Platform


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    platform: Platform,
    seed: int,
    precision: PrecisionConfig | None = None,
) -> GPTModel:
    """This rank's part of the model, with its initial weights.

    Args:
        model: shape of the model.
        parallel: degrees of parallelism; process groups must exist.
        platform: decides between Transformer Engine's modules and torch's.
        seed: seed of the initial weights, which depend on it and on the parameter's name alone.
        precision: how linear layers multiply, by default as `model.precision` says; in FP8 the model has an `fp8_plan`.

    Raises:
        ConfigError: the platform cannot multiply as `precision` asks.
    """
    precision = precision or PrecisionConfig()
    fp8 = wants_fp8(precision, platform)
    if not platform.transformer_engine:
        adopt_torch_modules()
    fused = platform.transformer_engine
    config = transformer_config(model, parallel, fused=fused, fp8=fp8 and fused)
    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    provider = gpt_layer_specs.TESpecProvider() if platform.transformer_engine else TorchSpecProvider()
    block.layer_norm = provider.layer_norm(rms_norm=True)
    use_latent_attention(block)
    prediction = None
    if config.mtp_num_layers and parallel_state.is_pipeline_last_stage():
        prediction = gpt_layer_specs.get_gpt_mtp_block_spec_for_backend(config, block, backend=provider)
    built = GPTModel(
        config,
        block,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=model.rope.base,
        share_embeddings_and_output_weights=False,
        mtp_block_spec=prediction,
    )
    initialise(built, model.init_std, seed)
    if fp8:
        built.fp8_plan = use_fp8(built, precision, platform)
    return built.to(platform.device)


def native_tensors(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its megatron-core name: parameters, and the routers' expert bias, which is a buffer."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            yield name, buffer.detach()


def load_native_tensors(model: GPTModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the model by name.

    Raises:
        DataError: a tensor is missing, left over, or has another shape.
    """
    wanted = dict(native_tensors(model))
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise DataError(f"{name}: {'missing from the weights' if name in wanted else 'not a tensor of this model'}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise DataError(f"{name}: has shape {tuple(tensors[name].shape)}, must have {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])


@contextmanager
def without_multi_token_prediction(model: GPTModel) -> Iterator[None]:
    """Run only the backbone: for log-probabilities and sampling, where no extra token is predicted."""
    saved = model.mtp_process, model.config.mtp_num_layers
    model.mtp_process, model.config.mtp_num_layers = False, None
    try:
        yield
    finally:
        model.mtp_process, model.config.mtp_num_layers = saved
