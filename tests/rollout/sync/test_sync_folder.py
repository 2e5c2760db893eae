"""The folder that servers start from and sync by: what a group would send them, bit for bit."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_r1.config.sglang import ServerConfig, SGLangConfig, SpeculativeConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.hf.model_config import folder_format
from megatron_r1.platform import shared_memory
from megatron_r1.rl.placement import Separate
from megatron_r1.rollout import factory
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.factory import sglang_engine, weight_payload
from megatron_r1.rollout.sglang.servers import discovery as addresses
from megatron_r1.rollout.sync.model_folder import write_shape
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
        assert folder_format(export) == "fp8"
        read = dict(load_tensors(export, SHAPE))
    assert read.keys() == native.keys()
    for name, given in native.items():
        gap = (read[name].float() - given.float()).abs()
        assert float(gap.max()) <= float(given.float().abs().max()) / 16, name


def test_folder_leaves_out_the_multi_token_layers_by_default(native, tokenizer):
    with DiskSync(native.items, SHAPE, tokenizer) as disk:
        assert load_file(disk.write() / "model.safetensors").keys() == expected_shapes(SHAPE, include_mtp=False).keys()


@pytest.fixture
def server(monkeypatch):
    """The address of a server that answers as SGLang does."""
    monkeypatch.setenv(addresses.API_KEY, KEY)
    monkeypatch.setenv(addresses.ADMIN_KEY, ADMIN_KEY)
    with fakes(1) as (fake,):
        yield fake.url


def test_servers_load_what_the_configuration_chooses(native, tokenizer, tmp_path, server):
    disk, folders = WeightSyncConfig(method="disk", include_mtp=True), []
    rollout = RolloutConfig(weight_sync=disk, sglang=SGLangConfig(addresses=[server]))
    with sglang_engine(rollout, SHAPE, native.items, tokenizer, tmp_path / "logs", "cpu") as (engine, sync):
        for version in ("0", "1"):
            sync.push(version)
            folders.append(engine.weights_folder)
            assert load_file(folders[-1] / "model.safetensors").keys() == expected_shapes(SHAPE).keys()
    assert folders[0] != folders[1]


@pytest.mark.parametrize("method", ["group", "disk"])
def test_no_weight_is_read_or_written_to_start_servers(new_model, tokenizer, tmp_path, server, monkeypatch, method):
    """The first sync sends them; until then the servers refuse to generate."""

    def read(*_):
        raise AssertionError("the start of servers gathers the model")

    monkeypatch.setattr(factory, "whole_tensors", read)
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for folder in ("memory", "temporary"):
        (tmp_path / folder).mkdir()
    rollout = RolloutConfig(weight_sync=WeightSyncConfig(method=method), sglang=SGLangConfig(addresses=[server]))
    shape = ModelConfig()
    start = rollout, shape, new_model(shape), tokenizer, tmp_path / "logs", "cpu", Separate()
    with factory.training_sglang_engine(*start) as (engine, _):
        assert bytes_in(tmp_path / "memory") == bytes_in(tmp_path / "temporary") == 0 and engine.weights_folder is None
        with pytest.raises(NoRolloutCapacity, match="arbitrary weights until the first update"):
            engine.generate([Request("a", (5,))], Sampling(1.0, 1.0, 1, (), 0))


def bytes_in(folder: Path) -> int:
    """Bytes of the folders in it through which weights go to servers."""
    files = (path for one in folder.glob("megatron_r1-weights-*") for path in one.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def test_a_start_writes_the_shape_of_what_is_sent(tokenizer, tmp_path):
    view = write_shape(tmp_path, chosen(True, True), tokenizer)
    config = json.loads((view / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["quantization_config"]["weight_block_size"] == [128, 128]
    assert {path.name for path in view.iterdir()} == {"config.json", "generation_config.json"}
