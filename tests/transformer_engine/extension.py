"""A module that stands where Transformer Engine's compiled extension, `transformer_engine_torch`, would be loaded.

A name of the extension is its kernel in torch (`kernels.py`) where there is one. Any other is an `Unknown`: enough for
what Transformer Engine's Python half does at import (constants, annotations), and an error that names it when called.
"""

from __future__ import annotations

import enum
import sys
import types
import warnings
from typing import Any, ClassVar

from tests.transformer_engine import fp8, kernels


class Unknown:
    """A name of the compiled extension, or a name of one of those; equal to itself alone."""

    path: str
    _known: ClassVar[dict[str, Unknown]] = {}

    def __new__(cls, path: str):
        if path not in cls._known:
            cls._known[path] = self = object.__new__(cls)
            self.path = path
        return cls._known[path]

    def __getattr__(self, name: str) -> Any:
        if name == "__members__":  # Transformer Engine reads it of enumerations
            prefix = f"{self.path}."
            return {path.removeprefix(prefix): one for path, one in self._known.items() if path.startswith(prefix)}
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(f"{self.path}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self.path}: tests/transformer_engine/kernels.py has no such kernel")

    def __instancecheck__(self, _: object) -> bool:
        return False

    def __index__(self) -> int:
        return [*self._known].index(self.path)

    __int__ = __index__

    def __repr__(self) -> str:
        return self.path


class StandIn(types.ModuleType):
    """The extension without its compiled code."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(name)


def install() -> None:
    """Import Transformer Engine with the stand-in; must come before anything else imports it."""
    import torch
    import transformer_engine.common as common

    module = StandIn("transformer_engine_torch")
    named = {name: kernel for name, kernel in vars(kernels).items() if name in kernels.OF_THE_EXTENSION}
    named |= {name: getattr(fp8, name) for name in fp8.OF_THE_EXTENSION}
    module.__dict__.update(named, DType=enum.IntEnum("DType", [(f"k{name}", n) for name, n in kernels.TYPES.items()]))
    common.load_framework_extension = lambda _: sys.modules.setdefault("transformer_engine_torch", module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.pytorch.cpp_extensions as reexported
        from transformer_engine.pytorch.triton import permutation

    reexported.__getattr__ = module.__getattr__  # it takes the extension's names by `import *`, which sees no Unknown
    torch.distributed._coalescing_manager = fp8.together
    for name in kernels.OF_TRITON:
        setattr(permutation, name, getattr(kernels, name))
