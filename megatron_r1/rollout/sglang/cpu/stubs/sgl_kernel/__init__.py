"""Stands in for SGLang's kernel package where it is not built: names can be imported, nothing can be called.

SGLang imports a few names of `sgl_kernel` on every path and calls none of them on the plain torch path that CPU
servers take. The folder above is put on the path of CPU servers alone, and only where the real package is absent.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} was called, but sgl_kernel is not installed here")

    return absent
