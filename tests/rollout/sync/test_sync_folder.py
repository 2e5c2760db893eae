"""The folder that servers start from and sync by: what a group would send them, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_r1.config.sglang import ServerConfig, SGLangConfig, SpeculativeConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.hf.load import folder_format
from megatron_r1.rollout.factory import sglang_engine, weight_payload
from megatron_r1.rollout.sglang.servers import discovery as addresses
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.strategies import DiskSync
from tests.support.fake_sglang import ADMIN_KEY, KEY, fakes
from tests.support.whole_models import expected_shapes, load_tensors, native_shapes

SHAPE = ModelConfig(dtype="bf16", hidden_size=136, ffn_hidden_size=264, vocab_size=512)
"""Widths that cross edges of 128."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(num_documents=500)).save(folder)
    return folder


@pytest.fixture(scope="module")
def native():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(torch.float32 if name.endswith("bias") else torch.bfloat16)
        for name, shape in native_shapes(SHAPE).items()
    }


def chosen(sync_mtp: bool, fp8: bool) -> WeightPayload:
    """As the configuration of a run chooses it; servers that draft where they can."""
    speculative = SpeculativeConfig(method="mtp" if sync_mtp else "none")
    server = ServerConfig(quantization="fp8" if fp8 else "none", speculative=speculative)
    return weight_payload(
        RolloutConfig(weight_sync=WeightSyncConfig(include_mtp=sync_mtp), sglang=SGLangConfig(server=server)), SHAPE
    )


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sync_mtp", [False, True])
def test_folder_holds_what_a_group_sends(native, tokenizer, sync_mtp, fp8):
    payload = chosen(sync_mtp, fp8)
    with DiskSync(native.items, SHAPE, tokenizer, payload) as disk:
        folder = disk.write()
        written = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
    sent = {one.name: one.tensor for one in payload.tensors(native.items(), complete=True)}
    assert written.keys() == sent.keys()
    for name, tensor in sent.items():
        assert written[name].dtype == tensor.dtype and written[name].shape == tensor.shape
        assert torch.equal(written[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    weights = {name for name in written if not name.endswith("_scale_inv")}
    assert weights == expected_shapes(SHAPE, include_mtp=sync_mtp).keys()
    drafts = [name for name in weights if name.startswith(f"model.layers.{SHAPE.num_layers}.")]
    assert bool(drafts) == sync_mtp and config["num_nextn_predict_layers"] == int(sync_mtp)
    scaled = {name.removesuffix("_scale_inv") for name in written if name.endswith("_scale_inv")}
    assert scaled == {name for name in written if written[name].dtype == torch.float8_e4m3fn}
    assert bool(scaled) == fp8 == ("quantization_config" in config)
    if fp8 and sync_mtp:
        assert any(name in scaled for name in drafts)


def test_folder_in_fp8_is_read_as_one(native, tokenizer):
    """By what reads the releases: their format, and weights within half a step of E4M3, a sixteenth, of the given."""
    with DiskSync(native.items, SHAPE, tokenizer, chosen(True, True)) as disk:
        disk.write()
        export = disk.write()
        assert folder_format(export / "config.json") == "fp8"
        read = dict(load_tensors(export, SHAPE))
    assert read.keys() == native.keys()
    for name, given in native.items():
        gap = (read[name].float() - given.float()).abs()
        assert float(gap.max()) <= float(given.float().abs().max()) / 16, name


def test_folder_leaves_out_the_multi_token_layers_by_default(native, tokenizer):
    with DiskSync(native.items, SHAPE, tokenizer) as disk:
        assert load_file(disk.write() / "model.safetensors").keys() == expected_shapes(SHAPE, include_mtp=False).keys()


def test_servers_start_from_and_sync_by_what_the_configuration_chooses(native, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv(addresses.API_KEY, KEY)
    monkeypatch.setenv(addresses.ADMIN_KEY, ADMIN_KEY)
    with fakes(1) as (fake,):
        rollout = RolloutConfig(
            weight_sync=WeightSyncConfig(method="disk", include_mtp=True), sglang=SGLangConfig(addresses=[fake.url])
        )
        with sglang_engine(rollout, SHAPE, native.items, tokenizer, tmp_path / "logs", "cpu") as (engine, sync):
            started = engine.weights_folder
            sync.push("new")
            synced = engine.weights_folder
            for folder in (started, synced):
                assert load_file(folder / "model.safetensors").keys() == expected_shapes(SHAPE).keys()
    assert started != synced
