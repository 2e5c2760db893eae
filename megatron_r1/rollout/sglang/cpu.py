"""What SGLang 0.5.23 lacks to serve DeepSeek-V3 on a machine without a GPU, as an SGLang plugin.

Announced in the entry point group ``sglang.srt.plugins``, so every SGLang process calls `register`; it acts only in
servers that this package starts on the CPU (`environment` marks them).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

from megatron_r1.errors import PlatformError

GROUP, NAME = "sglang.srt.plugins", "megatron_r1_cpu"
MARK = "SGLANG_USE_CPU_ENGINE"


def environment(tensor_parallel: int) -> dict[str, str]:
    """Environment variables of a CPU server.

    Raises PlatformError when this package's plugin is not announced: without it SGLang's torch_native attention takes
    the unabsorbed path for latent attention, whose log-probs are wrong without a word.
    """
    if not importlib.metadata.entry_points(group=GROUP, name=NAME):
        raise PlatformError("SGLang on the CPU needs this package's plugin: install the package (pip install -e .)")
    variables = {
        MARK: "1",
        "SGLANG_PLUGINS": NAME,
        "OMP_NUM_THREADS": "1",  # more threads on shared cores cost more than they give
        "TORCHDYNAMO_DISABLE": "1",  # otherwise the first batch waits half a minute for a compiler
    }
    if not importlib.util.find_spec("sgl_kernel"):
        variables["PYTHONPATH"] = str(Path(__file__).parent / "stubs")
    if tensor_parallel > 1:
        cores = sorted(os.sched_getaffinity(0))
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(tensor_parallel)
        )
    return variables


def register() -> None:
    """Called by SGLang in each of its processes. A failure ends the process: SGLang itself would only log it."""
    if os.environ.get(MARK) != "1":
        return
    try:
        _absorbed_latent_attention()
        _plain_host_memory()
        _batched_decode()
        _forked_processes()
    except Exception as error:
        raise SystemExit(f"megatron_r1's CPU plugin does not fit this SGLang: {error!r}") from error


def _absorbed_latent_attention() -> None:
    """torch_native has no rule of its own and would take triton's, which reads keys that this backend ignores."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handler

    def always_absorbed(attention: Any, forward_batch: Any) -> Any:
        return handler._dispatch_mla_subtype(attention, forward_batch)

    handler.AttentionBackendRegistry.register("torch_native", always_absorbed)


def _plain_host_memory() -> None:
    """The host buffer of routed experts is pinned through CUDA by default."""
    import torch
    from sglang.srt.mem_cache.pool_host import common

    def plain(dims: Any, dtype: torch.dtype, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device="cpu")

    common.ALLOC_MEMORY_FUNCS["cpu"] = plain


def _batched_decode() -> None:
    """All sequences at once where the case is plain self-attention; everything else is left to torch_native."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megatron_r1.rollout.sglang.decode import batched_decode

    def decode(
        original: Any,
        backend: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        encoder_lens: Any = None,
        scaling: float | None = None,
        sliding_window_size: int | None = None,
        **rest: Any,
    ) -> Any:
        windowed = sliding_window_size is not None and sliding_window_size > -1
        if encoder_lens is not None or windowed or rest.get("is_cross_attn"):
            return original(
                backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens,
                scaling=scaling, sliding_window_size=sliding_window_size, **rest,
            )  # fmt: skip
        slots = req_to_token[req_pool_indices, : int(seq_lens.max())]
        batched_decode(query, k_cache, v_cache, slots, seq_lens, scaling, output)
        return output

    target = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode"
    HookRegistry.register(target, decode, HookType.AROUND)


def _forked_processes() -> None:
    """SGLang's processes start as forks: each would otherwise import all of torch and SGLang again, 8 CPU seconds.

    Safe here: the server forks before it opens sockets or contexts, and no accelerator's state is there to be torn.
    """
    import multiprocessing

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def fork(result: Any, *_: Any, **__: Any) -> None:
        multiprocessing.set_start_method("fork", force=True)

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork, HookType.AFTER)
