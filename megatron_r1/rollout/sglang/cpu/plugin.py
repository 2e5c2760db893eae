"""What SGLang 0.5.23 lacks to serve DeepSeek-V3 on a machine without a GPU, as an SGLang plugin.

Announced in the entry point group ``sglang.srt.plugins``, so every SGLang process calls `register`; it acts only in
servers that this package starts on the CPU (`environment` marks them), and in those that must take deltas of weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from megatron_r1.errors import PlatformError
from megatron_r1.rollout.sglang import delta as deltas

GROUP, NAME = "sglang.srt.plugins", "megatron_r1_cpu"
MARK = "SGLANG_USE_CPU_ENGINE"
NCCL, BINDING = "SGLANG_NCCL_SO_PATH", "SGLANG_CPU_OMP_THREADS_BIND"
READ_LATE = {NCCL, BINDING, deltas.VARIABLE}
"""Variables by which servers may differ that are forked from one process: they are read as a server starts."""
RETAINED = 1 << 30
"""Bytes of freed memory that a server keeps rather than give back to the system."""


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
        # A bucket of weights is received into memory of the same size again and again. By default glibc gives so much
        # back to the system each time, which then zeroes every page anew: longer than the bucket travels.
        "MALLOC_MMAP_THRESHOLD_": str(RETAINED),
        "MALLOC_TRIM_THRESHOLD_": str(RETAINED),
    }
    if not importlib.util.find_spec("sgl_kernel"):
        variables["PYTHONPATH"] = str(Path(__file__).parent / "stubs")
    if tensor_parallel > 1:
        # A CUDA build of torch brings NCCL, which SGLang would try on CPU tensors; what it cannot load it leaves out.
        variables[NCCL] = os.devnull
        cores = sorted(os.sched_getaffinity(0))
        variables[BINDING] = "|".join(str(cores[rank % len(cores)]) for rank in range(tensor_parallel))
    return variables


def register() -> None:
    """Called by SGLang in each of its processes. A failure ends the process: SGLang itself would only log it."""
    try:
        deltas.register()
        if os.environ.get(MARK) != "1":
            return
        _absorbed_latent_attention()
        _plain_host_memory()
        _batched_attention()
        _forked_processes()
        _loading_in_one_thread()
        _the_device_is_the_cpu()
        _without_the_trainers_library()
    except Exception as error:
        raise SystemExit(f"megatron_r1's plugin does not fit this SGLang: {error!r}") from error


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


def _batched_attention() -> None:
    """One new token a sequence is attended for all sequences at once; everything else is left to torch_native.

    Decoding is that, and so is reading a prompt of which all but the last token is in the cache already.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    HookRegistry.register(f"{backend}._run_sdpa_forward_decode", _decode, HookType.AROUND)
    HookRegistry.register(f"{backend}._run_sdpa_forward_extend", _extend, HookType.AROUND)


def _decode(original: Any, backend: Any, *tensors: Any, **options: Any) -> Any:
    """In place of TorchNativeAttnBackend._run_sdpa_forward_decode, with its arguments."""
    *paged, encoder_lengths = tensors
    if not _is_plain(encoder_lengths, options):
        return original(backend, *tensors, **options)
    return _one_token_each(*paged, scale=options["scaling"])


def _extend(original: Any, backend: Any, *tensors: Any, **options: Any) -> Any:
    """In place of TorchNativeAttnBackend._run_sdpa_forward_extend, with its arguments."""
    *paged, _, new_lengths, encoder_lengths = tensors
    if not (options["causal"] and _is_plain(encoder_lengths, options) and bool((new_lengths == 1).all())):
        return original(backend, *tensors, **options)
    return _one_token_each(*paged, scale=options["scaling"])


def _is_plain(encoder_lengths: Any, options: dict[str, Any]) -> bool:
    """Self-attention over the whole of a sequence."""
    window = options["sliding_window_size"]
    return encoder_lengths is None and not options["is_cross_attn"] and (window is None or window < 0)


def _one_token_each(
    query: Any, output: Any, keys: Any, values: Any, slot_table: Any, rows: Any, lengths: Any, *, scale: float | None
) -> Any:
    from megatron_r1.rollout.sglang.cpu.decode import batched_decode

    batched_decode(query, keys, values, slot_table[rows, : int(lengths.max())], lengths, scale, output)
    return output


def _forked_processes() -> None:
    """SGLang's processes start as forks: each would otherwise import all of torch and SGLang again, 8 CPU seconds.

    Safe here: the server forks before it opens sockets or contexts, and no accelerator's state is there to be torn.
    """
    import multiprocessing

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def fork(result: Any, *_: Any, **__: Any) -> None:
        multiprocessing.set_start_method("fork", force=True)

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork, HookType.AFTER)


def _loading_in_one_thread() -> None:
    """DeepSeek's loader gives every tensor in host memory to a pool of threads, so that copies to a device overlap.

    Where the host is the device they only wait for each other's interpreter lock, and for being started.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    loader = "sglang.srt.models.deepseek_common.deepseek_weight_loader"
    HookRegistry.register(f"{loader}.should_async_load", lambda *_, **__: False, HookType.AROUND)


def _the_device_is_the_cpu() -> None:
    """Asked for the device without a name, a CUDA build of torch answers CUDA, there or not.

    SGLang asks so when it has given back memory, and waits for that device.
    """
    import torch

    of_device = torch.get_device_module

    def cpu_unless_named(device: Any = None) -> Any:
        return of_device("cpu" if device is None else device)

    torch.get_device_module = cpu_unless_named  # type: ignore[assignment]


def _without_the_trainers_library() -> None:
    """SGLang's debugging dumper imports megatron-core where it finds it, a second of a core: it is the trainer's."""
    sys.modules.setdefault("megatron.core", None)  # type: ignore[arg-type]
