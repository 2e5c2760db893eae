"""Translates the options of servers into SGLang's: fields of its ServerArgs, and environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1.config.sglang import AUTO, ServerConfig, SGLangConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.sglang import delta as deltas
from megatron_r1.rollout.sglang.cpu import plugin as cpu

SPARE_TOKENS = 8
"""SGLang keeps a few positions of the context for itself."""


def server_arguments(
    model_folder: Path,
    config: SGLangConfig,
    *,
    device: str,
    dtype: str,
    context_length: int,
    version: str,
    weights: bool = True,
    first_gpu: int = 0,
) -> dict[str, Any]:
    """Fields of SGLang's ServerArgs: token ids in and out, no network, idle servers sleep.

    Args:
        weights: whether the folder holds weights; without them the server starts on arbitrary ones.
        first_gpu: of those that the server takes; without effect on a CPU.

    Raises:
        ConfigError: an option needs CUDA and the device is the CPU.
    """
    if device == "cpu":
        refuse_on_cpu(config.server)
    arguments: dict[str, Any] = {
        "model_path": str(Path(model_folder).resolve()),
        "device": device,
        "dtype": dtype,
        "context_length": context_length + SPARE_TOKENS,
        "weight_version": version,
        "max_running_requests": config.max_running_requests,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "sleep_on_idle": True,
        "log_level": "info",
        "log_level_http": "warning",
    }
    if not weights:
        arguments["load_format"] = "dummy"
    if config.max_total_tokens:
        arguments["max_total_tokens"] = config.max_total_tokens
    if device == "cpu":
        arguments |= {"attention_backend": "torch_native", "disable_cuda_graph": True}
    else:
        arguments["base_gpu_id"] = first_gpu
    return arguments | options(config.server)


def options(server: ServerConfig) -> dict[str, Any]:
    """A server's options in SGLang's names; options that SGLang decides are left out."""
    chosen: dict[str, Any] = {"tp_size": server.tensor_parallel, "ep_size": server.expert_parallel}
    if server.data_parallel_attention > 1:
        chosen |= {"dp_size": server.data_parallel_attention, "enable_dp_attention": True}
    if server.memory_fraction:
        chosen["mem_fraction_static"] = server.memory_fraction
    if server.chunked_prefill_tokens:
        chosen["chunked_prefill_size"] = server.chunked_prefill_tokens
    if server.quantization != "none":
        chosen["quantization"] = server.quantization
    if server.kv_cache_dtype != AUTO:
        chosen["kv_cache_dtype"] = server.kv_cache_dtype
    if server.attention_backend != AUTO:
        chosen["attention_backend"] = server.attention_backend
    if server.expert_dispatch != "none":
        chosen["moe_a2a_backend"] = server.expert_dispatch
    if server.return_routed_experts:
        chosen["enable_return_routed_experts"] = True
    if server.memory_saver:
        chosen["enable_memory_saver"] = True
    if not server.cuda_graph:
        chosen["disable_cuda_graph"] = True
    if server.speculative.method == "mtp":
        chosen |= {
            "speculative_algorithm": "NEXTN",
            "speculative_num_steps": server.speculative.steps,
            "speculative_eagle_topk": server.speculative.top_k,
            "speculative_num_draft_tokens": server.speculative.draft_tokens,
        }
    return chosen


def refuse_on_cpu(server: ServerConfig) -> None:
    """Refuse what needs CUDA.

    Drafting does in SGLang 0.5.23: its draft worker synchronises with CUDA as it shares the embedding, torch_native
    attention has no drafting form, and where these are mended answers are verified on the CPU against the most likely
    token whatever the temperature, so that they would not be samples of the policy.

    Raises:
        ConfigError: an option needs CUDA.
    """
    allowed = ServerConfig()
    for name in ("data_parallel_attention", "quantization", "kv_cache_dtype", "expert_dispatch", "memory_saver"):
        if (value := getattr(server, name)) != (only := getattr(allowed, name)):
            shown = str(only).lower() if isinstance(only, bool) else only
            raise ConfigError(f"rollout.sglang.server.{name}", value, f"must be {shown} on a CPU: it needs CUDA")
    if server.speculative.method != "none":
        method = server.speculative.method
        raise ConfigError("rollout.sglang.server.speculative.method", method, "must be none on a CPU: it needs CUDA")
    if server.attention_backend not in (AUTO, "torch_native"):
        value = server.attention_backend
        raise ConfigError("rollout.sglang.server.attention_backend", value, "must be auto or torch_native on a CPU")


def server_environment(device: str, server: ServerConfig, delta: bool = False) -> dict[str, str]:
    """Environment variables of the servers, beside those of this process; with `delta` they take deltas of weights."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for SPARE_TOKENS, which no request reaches
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # probes that generate can pile up and end a server
    }
    if device == "cpu":
        variables |= cpu.environment(server.tensor_parallel)
    elif server.memory_saver:
        variables["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"  # else the memory of CUDA graphs stays with the server
    return variables | (deltas.ENVIRONMENT if delta else {})
