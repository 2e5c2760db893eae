"""Models in float64, in which rounding cannot hide a difference; megatron-core and the package know bf16 and fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

DTYPE = "fp64"


@contextmanager
def float64() -> Iterator[None]:
    """`model.dtype=fp64` builds and trains, and whatever asks for fp32 on the way gets float64 too."""
    from megatron_r1.model import spec

    experts, type_of, softmax, before = spec._experts, torch.Tensor.type, torch.softmax, torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spec.DTYPES, DTYPE, torch.float64)
        patch.setattr(spec, "_experts", lambda model: experts(model) | {"moe_router_dtype": model.dtype})
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        wide = {torch.float32: torch.float64}
        patch.setattr(torch, "softmax", lambda *a, dtype=None, **k: softmax(*a, dtype=wide.get(dtype, dtype), **k))
        # The distributed optimizer knows no float64.
        named = lambda self, *a: type_of(self, *a) if a else type_of(self).replace("Double", "Float")  # noqa: E731
        patch.setattr(torch.Tensor, "type", named)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
