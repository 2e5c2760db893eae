"""Batched decoding against attention written out sequence by sequence."""

import pytest
import torch

from megatron_r1.errors import PlatformError
from megatron_r1.rollout.sglang.cpu import decode
from megatron_r1.rollout.sglang.cpu import plugin as cpu
from megatron_r1.rollout.sglang.cpu.stubs import sgl_kernel


@pytest.mark.parametrize("key_value_heads", [1, 2, 6])
@pytest.mark.parametrize("gathered", [1, 400, 1 << 24])
def test_equals_attention_one_sequence_at_a_time(monkeypatch, key_value_heads, gathered):
    monkeypatch.setattr(decode, "GATHERED_ELEMENTS", gathered)
    generator = torch.Generator().manual_seed(0)
    sequences, heads, width, value_width, slots = 7, 6, 10, 8, 90
    query = torch.randn(sequences, heads, width, generator=generator)
    keys = torch.randn(slots, key_value_heads, width, generator=generator)
    values = torch.randn(slots, key_value_heads, value_width, generator=generator)
    lengths = torch.tensor([1, 2, 12, 5, 9, 12, 3])
    table = torch.randperm(slots, generator=generator)[: sequences * 12].view(sequences, 12).int()
    used = torch.cat([table[i, :length] for i, length in enumerate(lengths)])
    unused = torch.ones(slots, dtype=torch.bool).index_fill(0, used.long(), False)
    keys[unused], values[unused] = torch.nan, torch.nan  # a number read beyond a sequence's end would show
    output = torch.empty(sequences, heads, value_width)
    decode.batched_decode(query, keys, values, table, lengths, 0.3, output)
    for i, length in enumerate(lengths):
        own = table[i, :length].long()
        for head in range(heads):
            shared = head // (heads // key_value_heads)
            weights = (keys[own, shared] @ query[i, head] * 0.3).softmax(0)
            torch.testing.assert_close(output[i, head], weights @ values[own, shared], rtol=1e-5, atol=1e-6)


def test_stand_in_can_be_imported_from_but_not_called():
    with pytest.raises(NotImplementedError, match="sgl_kernel.silu_and_mul was called"):
        sgl_kernel.silu_and_mul(1, out=2)
    assert not hasattr(sgl_kernel, "__path_to_nothing__")


def test_without_its_plugin_no_cpu_server_starts(monkeypatch):
    monkeypatch.setattr(cpu.importlib.metadata, "entry_points", lambda **_: ())
    with pytest.raises(PlatformError, match="install the package"):
        cpu.environment(tensor_parallel=1)


def test_plugin_leaves_other_servers_alone(monkeypatch):
    monkeypatch.delenv(cpu.MARK, raising=False)
    monkeypatch.setattr(cpu, "_absorbed_latent_attention", lambda: pytest.fail("acted without its mark"))
    cpu.register()


def test_plugin_that_does_not_fit_ends_the_process(monkeypatch):
    def misfit() -> None:
        raise AttributeError("no such registry")

    monkeypatch.setenv(cpu.MARK, "1")
    monkeypatch.setattr(cpu, "_absorbed_latent_attention", misfit)
    with pytest.raises(SystemExit, match="no such registry"):
        cpu.register()
