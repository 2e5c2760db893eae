"""What SGLang serves of a model is known before a server starts; held against SGLang's own tables."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_r1.config.keys import only_read
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.serving import ANY_SIZE, LATENT_SIZES, PUBLISHED_LATENTS, check_division, on_cuda
from megatron_r1.config.sglang import ATTENTION_BACKENDS, ServerConfig
from megatron_r1.errors import ConfigError

SERVER = "rollout.sglang.server"


@cache
def preset(name: str) -> ModelConfig:
    return load("pretrain", [f"model={name}"]).model


def sixteen_bits(name: str) -> ModelConfig:
    return replace(preset(name), dtype="bf16")


def sglang(path: str) -> str:
    """One of SGLang's source files, which is read without importing it."""
    return (Path(importlib.util.find_spec("sglang").origin).parent / "srt" / path).read_text()


@pytest.mark.parametrize(
    ("model", "given", "chosen"),
    [
        ("tiny", "auto", "triton"),  # latents of 32
        ("tiny_dense", "auto", "triton"),  # heads of 32
        ("small", "auto", "triton"),
        ("moonlight_16b", "auto", "auto"),
        ("v3_671b", "auto", "auto"),
        ("qwen2_5_0_5b", "auto", "auto"),
        ("llama3_3_70b", "auto", "auto"),
        ("v3_671b", "flashmla", "flashmla"),
        ("moonlight_16b", "fa3", "fa3"),
        ("qwen3_0_6b", "fa3", "fa3"),
        ("tiny_dense", "fa3", "fa3"),
        ("tiny", "torch_native", "torch_native"),
    ],
)
def test_attention_on_a_gpu_has_kernels_for_the_models_sizes(model, given, chosen):
    assert on_cuda(ServerConfig(attention_backend=given), sixteen_bits(model)).attention_backend == chosen


@pytest.mark.parametrize(
    ("model", "given", "sizes"),
    [
        ("tiny", "fa3", "latents of 32 and rotary positions of 16"),
        ("tiny", "flashinfer", "latents of 32 and rotary positions of 16"),
        ("v3_671b", "trtllm_mha", "latents of 512 and rotary positions of 64"),
        ("tiny_dense", "flashinfer", "heads of 32"),
        ("qwen3_0_6b", "flashmla", "heads of 128"),
    ],
)
def test_an_attention_backend_without_kernels_for_them_is_refused(model, given, sizes):
    with pytest.raises(ConfigError) as refused:
        on_cuda(ServerConfig(attention_backend=given), sixteen_bits(model))
    allowed = f"has no kernels for {sizes}: must be auto or one of triton, torch_native, flex_attention"
    assert str(refused.value) == f"{SERVER}.attention_backend={given}: {allowed}"


@pytest.mark.parametrize("verb", ["grpo", "pretrain"])
def test_32_bits_are_refused_on_a_gpu_where_sglang_samples(verb):
    """Before a GPU is needed; another engine, and another verb, may have them."""
    command = ["platform=cuda"]
    if verb == "pretrain":
        load(verb, command)
        return
    load(verb, [*command, "init.from=runs/base", "rollout.engine=local"])
    with pytest.raises(ConfigError, match=r"^model\.dtype=fp32: must be bf16 with rollout\.engine=sglang on a GPU"):
        load(verb, [*command, "init.from=runs/base"])


@pytest.mark.parametrize(("recipe", "accepted"), [("r1_tiny", False), ("r1_tiny_gpu", True)])
def test_the_whole_recipe_of_the_quickstart_has_a_form_for_gpus(recipe, accepted):
    overrides = load("pipeline", [f"pipeline={recipe}"], "r1_tiny").pipeline.overrides
    command = ["platform=cuda", "init.from=runs/base", *only_read("grpo", overrides)]
    if accepted:
        assert load("grpo", command).model.dtype == "bf16"
        return
    with pytest.raises(ConfigError, match=r"^model\.dtype=fp32: must be bf16"):
        load("grpo", command)


@pytest.mark.parametrize(
    ("model", "options", "refused"),
    [
        ("moonlight_16b", {"tensor_parallel": 8}, ""),
        ("moonlight_16b", {"tensor_parallel": 32}, "tensor_parallel=32: must divide model.num_attention_heads=16"),
        ("moonlight_16b", {"tensor_parallel": 16, "data_parallel_attention": 2}, ""),
        ("moonlight_16b", {"tensor_parallel": 3, "expert_parallel": 3}, "tensor_parallel=3: must divide"),
        ("tiny", {"tensor_parallel": 4, "expert_parallel": 4}, ""),
        ("v3_671b", {"tensor_parallel": 16, "quantization": "fp8"}, ""),
        ("v3_671b", {"tensor_parallel": 32, "quantization": "fp8"}, "of model.ffn_hidden_size=18432"),
        ("moonlight_16b", {"tensor_parallel": 4, "expert_parallel": 4, "quantization": "fp8"}, "num_shared_experts"),
        ("moonlight_16b", {"tensor_parallel": 2, "quantization": "fp8"}, "of model.moe.ffn_hidden_size=1408"),
        ("moonlight_16b", {"tensor_parallel": 2, "expert_parallel": 2, "quantization": "fp8"}, ""),
        ("qwen2_5_0_5b", {"tensor_parallel": 2, "quantization": "fp8"}, "tensor_parallel=2: must leave each rank"),
    ],
)
def test_a_division_among_ranks_that_sglang_refuses(model, options, refused):
    server = ServerConfig(**options)
    if not refused:
        check_division(server, preset(model))
        return
    with pytest.raises(ConfigError) as error:
        check_division(server, preset(model))
    assert str(error.value).startswith(f"{SERVER}.tensor_parallel=") and refused in str(error.value)
    assert "\n" not in str(error.value)


def test_experts_must_be_divided_evenly():
    with pytest.raises(ConfigError, match=rf"^{SERVER}\.expert_parallel=16: must divide model\.moe\.num_experts=8$"):
        check_division(
            ServerConfig(tensor_parallel=16, expert_parallel=16), replace(preset("tiny"), num_attention_heads=16)
        )


def test_attention_backends_are_sglangs_own():
    (choices,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(sglang("arg_groups/choices.py")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ATTENTION_BACKEND_CHOICES"
    ]
    assert set(ATTENTION_BACKENDS) <= set(choices) and LATENT_SIZES.keys() <= set(ATTENTION_BACKENDS)
    with pytest.raises(ConfigError, match="^attention_backend=flash_mla: must be one of auto, fa3"):
        ServerConfig(attention_backend="flash_mla")


def test_what_sglang_chooses_by_itself_serves_the_published_sizes():
    """By its own function: on Hopper fa3, on Blackwell others, which have kernels for these sizes alone."""
    source = sglang("arg_groups/model_override_base.py")
    (function,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "get_default_attn_backend"]
    assert isinstance(function, ast.FunctionDef)
    choice = function.body[-1]
    assert isinstance(choice, ast.If)
    latent = choice.orelse  # `if not use_mla_backend: ... else: ...`
    chosen = {node.value.value for part in latent for node in ast.walk(part) if isinstance(node, ast.Return)
              and isinstance(node.value, ast.Constant)}  # fmt: skip
    assert {"fa3", "flashinfer", "triton"} <= chosen <= {*LATENT_SIZES, *ANY_SIZE, "aiter"}
    for name in chosen & LATENT_SIZES.keys():
        assert all(width in sizes for width, sizes in zip(PUBLISHED_LATENTS, LATENT_SIZES[name], strict=True))
