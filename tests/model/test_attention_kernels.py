"""The environment chooses Transformer Engine's attention, and megatron-core accepts what it has chosen."""

from __future__ import annotations

import os
from itertools import product
from types import SimpleNamespace

import pytest

from megatron_r1.errors import PlatformError


@pytest.mark.parametrize("values", product((None, "0", "1"), repeat=3))
def test_the_choice_is_one_that_megatron_core_accepts(one_rank, monkeypatch, values):
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    from megatron_r1.model.attention_kernels import VARIABLES, chosen_attention

    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value or "0")  # also where it is then removed: what the code sets must be undone
        if not value:
            monkeypatch.delenv(name)
    left = [kind for kind, value in zip(VARIABLES.values(), values, strict=True) if value != "0"]
    if len(left) in (0, 2):
        with pytest.raises(PlatformError, match=r"NVTE_.*=0.*: set two of NVTE_FLASH_ATTN"):
            chosen_attention(os.environ)
        return
    for _ in range(2):  # the second model finds what the first one set
        chosen = chosen_attention(os.environ)
        assert chosen == (left[0] if len(left) == 1 else AttnBackend.auto)
        config = SimpleNamespace(attention_backend=chosen, flash_attention_version=None)
        LanguageModule._set_attention_backend(SimpleNamespace(config=config))
