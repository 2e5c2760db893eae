"""Adapter that lets megatron-core run on a machine without CUDA.

megatron-core 0.19 asks `torch.cuda` for devices, streams, events and random state, creates tensors on "cuda" and
compares CUDA type names. `prepare` replaces these functions by versions for the CPU, once, before megatron.core is
imported; it is never called where CUDA is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = (
    "arange as_tensor empty empty_like full full_like linspace ones ones_like "
    "rand randint randn tensor zeros zeros_like"
).split()
_FOR_GPUS = "deep_ep flash_attn flash_attn_3 flash_mla flashattn_hopper flashinfer transformer_engine".split()
_RECOMPUTATION = "megatron.core.tensor_parallel.random"
_prepared = False


class _Stream:
    """A stream on a CPU, where all operations run in order."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, _: object) -> None:
        pass

    def wait_event(self, _: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """An event that is always complete."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    def wait(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


def prepare() -> None:
    """Replace the CUDA functions that megatron-core uses by versions for the CPU. Further calls have no effect."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    _silence_what_is_known()
    _hide_packages_for_gpus()
    _change_modules_at_import()
    _replace_devices_and_streams()
    _replace_random_state()
    _create_tensors_on_cpu()
    _name_types_as_cuda()
    _split_by_lists()
    _leave_out_collectives_of_one_rank()


def _silence_what_is_known() -> None:
    """Silence the many warnings of megatron-core and torch, at import, that there is no GPU."""
    for message in (
        ".*(Apex|Transformer Engine|absl.logging).*",
        ".*(full scope is deprecated|MimoModelConfig).*",
        "The .grad attribute of a Tensor that is not a leaf Tensor.*",
        "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("torch.utils.cpp_extension", "megatron.core.models.gpt.gpt_model"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _hide_packages_for_gpus() -> None:
    """Make them unimportable: megatron-core uses what imports, and without a driver or an extension that fails.

    Of Transformer Engine it would take the optimizer, whose kernels are CUDA's.
    """
    modules: dict[str, Any] = sys.modules
    for name in _FOR_GPUS:
        modules.setdefault(name, None)  # importing it is an ImportError, as if it were not installed


def _change_modules_at_import() -> None:
    """megatron-core compiles functions that a CPU run does not call, or that count tokens; its timers know wandb.

    Importing torch's compiler takes as long as the rest of megatron-core, and its first call much longer. And for
    recomputed activations it compiles C++, which needs a compiler and most of a minute; a process that is killed
    meanwhile leaves a lock for which all later ones wait.
    """
    slow = ("megatron.core.jit", "megatron.core.timers", "megatron.core.transformer.moe.router")
    changes = dict.fromkeys(slow, _without_compiler_and_wandb)
    changes[_RECOMPUTATION] = _with_copied_storage
    sys.meta_path.insert(0, _ChangedModules(changes))
    if imported := sys.modules.get(_RECOMPUTATION):
        _with_copied_storage(lambda _: None, imported)


_Execute = Callable[[types.ModuleType], None]


class _ChangedModules:
    """Has some modules executed by functions that get the module's own execution and the module."""

    def __init__(self, changes: Mapping[str, Callable[[_Execute, types.ModuleType], None]]):
        self._changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        spec: Any = PathFinder.find_spec(name, path, target) if name in self._changes else None
        if spec is not None:
            spec.loader.exec_module = functools.partial(self._changes[name], spec.loader.exec_module)
        return spec


def _without_compiler_and_wandb(execute: _Execute, module: types.ModuleType) -> None:
    """Execute a module that asks for the compiler or for wandb as if there were neither."""
    modules: dict[str, Any] = sys.modules
    compiler, wandb = torch.compile, modules.get("wandb")
    torch.compile, modules["wandb"] = lambda function: function, None  # type: ignore[assignment]
    try:
        execute(module)
    finally:
        torch.compile = compiler
        del modules["wandb"]
        if wandb is not None:
            modules["wandb"] = wandb


def _with_copied_storage(execute: _Execute, module: Any) -> None:
    execute(module)
    module._get_share_storage = lambda: _copy_storage


def _copy_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Fill the storage of `target`, which was emptied, and so every view of it, with the bytes of `source`'s.

    Below autograd, as megatron-core's own function, which points to the bytes instead.
    """
    theirs, ours = source.untyped_storage(), target.untyped_storage()
    ours.resize_(theirs.nbytes())
    ours.copy_(theirs)


def _replace_devices_and_streams() -> None:
    cuda: Any = torch.cuda
    here = torch.device("cpu")
    cuda.current_device = lambda: here
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *_: (0, 0)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


def _replace_random_state() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_call = lambda *_, **__: None  # what waits for CUDA's start would be kept, with a stack trace each
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        module.manual_seed = torch.manual_seed
        module.initial_seed = torch.initial_seed


def _create_tensors_on_cpu() -> None:
    """megatron-core's optimizers and dispatchers create tensors on "cuda"; redirect them to the CPU."""

    def is_cuda(device: object) -> bool:
        return isinstance(device, str | torch.device) and str(device).startswith("cuda")

    def redirected(create: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(create)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and is_cuda(kwargs["device"]):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)  # pinning memory needs a GPU driver
            return create(*args, **kwargs)

        return on_cpu

    # `with torch.device(...)` caches the factory functions by identity; fill its cache before they are wrapped.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, redirected(getattr(torch, name)))
    move = torch.Tensor.to

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return move(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]


def _name_types_as_cuda() -> None:
    """DistributedOptimizer and Float16Optimizer compare `tensor.type()` with CUDA type names; return those."""
    for name in ("FloatTensor", "BFloat16Tensor", "HalfTensor", "DoubleTensor", "LongTensor", "IntTensor"):
        setattr(torch.cuda, name, getattr(torch, name))
    type_of = torch.Tensor.type

    @functools.wraps(type_of)
    def type_named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_named  # type: ignore[method-assign,assignment]


def _split_by_lists() -> None:
    """The all-to-all dispatcher passes split sizes as tensors, which a GPU run has already copied to lists; convert."""
    exchange = torch.distributed.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(exchange)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return exchange(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single  # type: ignore[assignment]


class _Done:
    """A collective that is over."""

    def wait(self, *_: object, **__: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _leave_out_collectives_of_one_rank() -> None:
    """A reduction or a broadcast among one rank changes nothing, but gloo hands it to a thread and waits for that."""
    dist: Any = torch.distributed

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(
            tensor: torch.Tensor, second: Any = None, group: Any = None, async_op: bool = False, **more: Any
        ) -> Any:
            if dist.get_world_size(group) == 1:
                return _Done() if async_op else None
            given = () if second is None else (second,)
            return collective(tensor, *given, group=group, async_op=async_op, **more)

        return call

    dist.all_reduce, dist.broadcast = unless_alone(dist.all_reduce), unless_alone(dist.broadcast)
