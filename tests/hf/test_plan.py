"""What would be written, against DeepSeek-V3's released list, built here from its sizes alone."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from math import prod

import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.checkpoint.tensor_file import TYPE_NAMES
from megatron_r1.config.load import load
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.plan import PlannedFile, hf_entries, hf_file_name, plan_files, totals

HIDDEN, HEADS, VOCABULARY, LAYERS, DENSE, EXPERTS = 7168, 128, 129280, 61, 3, 256


def released() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of every tensor of DeepSeek-V3's release (report, section 4.2; its weights' README)."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}

    def plain(name: str, *shape: int, kind: str = "BF16") -> None:
        tensors[name] = kind, shape

    def fp8(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = "F8_E4M3", (rows, columns)
        tensors[f"{name}.weight_scale_inv"] = "F32", ((rows + 127) // 128, (columns + 127) // 128)

    def gated(name: str, width: int) -> None:
        fp8(f"{name}.gate_proj", width, HIDDEN)
        fp8(f"{name}.up_proj", width, HIDDEN)
        fp8(f"{name}.down_proj", HIDDEN, width)

    plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    plain("lm_head.weight", VOCABULARY, HIDDEN)
    plain("model.norm.weight", HIDDEN)
    for number in range(LAYERS + 1):
        layer = f"model.layers.{number}"
        plain(f"{layer}.input_layernorm.weight", HIDDEN)
        plain(f"{layer}.post_attention_layernorm.weight", HIDDEN)
        fp8(f"{layer}.self_attn.q_a_proj", 1536, HIDDEN)
        plain(f"{layer}.self_attn.q_a_layernorm.weight", 1536)
        fp8(f"{layer}.self_attn.q_b_proj", HEADS * (128 + 64), 1536)
        fp8(f"{layer}.self_attn.kv_a_proj_with_mqa", 512 + 64, HIDDEN)
        plain(f"{layer}.self_attn.kv_a_layernorm.weight", 512)
        fp8(f"{layer}.self_attn.kv_b_proj", HEADS * (128 + 128), 512)
        fp8(f"{layer}.self_attn.o_proj", HIDDEN, HEADS * 128)
        if number < DENSE:
            gated(f"{layer}.mlp", 18432)
            continue
        plain(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        plain(f"{layer}.mlp.gate.e_score_correction_bias", EXPERTS, kind="F32")
        for expert in range(EXPERTS):
            gated(f"{layer}.mlp.experts.{expert}", 2048)
        gated(f"{layer}.mlp.shared_experts", 2048)
    last = f"model.layers.{LAYERS}"
    plain(f"{last}.embed_tokens.weight", VOCABULARY, HIDDEN)
    plain(f"{last}.enorm.weight", HIDDEN)
    plain(f"{last}.hnorm.weight", HIDDEN)
    plain(f"{last}.eh_proj.weight", HIDDEN, 2 * HIDDEN)
    plain(f"{last}.shared_head.norm.weight", HIDDEN)
    plain(f"{last}.shared_head.head.weight", VOCABULARY, HIDDEN)
    return tensors


def plan(model: str, format: str, shard_bytes: int) -> list[PlannedFile]:
    table = param_mappings(load("convert", [f"model={model}"]).model)
    return plan_files(table, lambda mapping: hf_entries(mapping, format), shard_bytes, hf_file_name)


def test_the_plan_of_deepseek_v3_is_its_release() -> None:
    started = time.process_time()
    files = plan("v3_671b", "fp8", 5_000_000_000)
    all_files = totals(files)
    assert time.process_time() - started < 60  # 2 on a quiet machine
    expected = released()
    found = {e.name: (TYPE_NAMES[e.dtype], e.shape) for file in files for e in file.entries}
    assert found == expected
    assert (len(expected), all_files.tensors) == (91_991, 91_991)
    assert sum(prod(shape) for _, shape in expected.values()) == all_files.elements == 684_531_386_000
    assert all_files.bytes_by_type["F32"] == 4 * (41_540_496 + 59 * 256)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("shard_bytes", [1, 30_000, 10**12])
def test_files_hold_every_tensor_once_in_order_and_up_to_the_limit(format: str, shard_bytes: int) -> None:
    files = plan("tiny", format, shard_bytes)
    entries = [entry for mapping in param_mappings(load("convert").model) for entry in hf_entries(mapping, format)]
    assert [entry for file in files for entry in file.entries] == entries
    assert all(file.nbytes <= shard_bytes or len(file.entries) == 1 for file in files)
    # No file could have taken the next one's first tensor.
    fits = [a.nbytes + b.entries[0].nbytes > shard_bytes for a, b in pairwise(files)]
    assert all(fits)
    assert [file.name for file in files] == [hf_file_name(number, len(files)) for number in range(len(files))]
    assert (len(files) == 1) == (files[0].name == "model.safetensors")


def test_the_command_prints_the_index_of_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["convert", "convert.dry_run=true", "model=v3_671b", "convert.dtype=fp8"]) == 0
    said = capsys.readouterr()
    index = json.loads(said.out)
    assert index["weight_map"].keys() == released().keys()
    assert index["metadata"]["total_size"] == 688_574_839_360
    assert "91,991" in said.err and "684,531,386,000" in said.err
    assert len(set(index["weight_map"].values())) == 139
