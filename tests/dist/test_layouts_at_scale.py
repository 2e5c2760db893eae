"""Layouts by model and number of GPUs, published and others: each is built on ranks that do not exist, or refused.

Sources: DeepSeek-V3's report, section 3.2; Megatron-LM's documentation of pipeline layouts; NVIDIA's recipes and
MLPerf submissions of Megatron-Bridge for H100, GB200 and GB300; Moonlight's and DeepSeek-V2's reports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import run_forked_to_the_end

PUBLISHED_BATCHES = ""
"""The batches of DeepSeek-V3's report: 3,072 sequences that grow to 15,360."""


@dataclass(frozen=True)
class Row:
    """A layout, and which layers the first pipeline rank has in each of its stages; or why it is refused."""

    model: str
    gpus: int
    parallel: str
    expected: list[int] | str
    batch: str = PUBLISHED_BATCHES
    further: str = ""

    @property
    def overrides(self) -> list[str]:
        degrees = [f"parallel.{NAMES[name]}={value}" for name, value in map(_split, self.parallel.split())]
        return [f"model={self.model}", *degrees, *_batches(self.batch), *self.further.split()]


NAMES = {
    "TP": "tensor",
    "PP": "pipeline",
    "VPP": "virtual_pipeline",
    "EP": "expert",
    "ETP": "expert_tensor",
    "CP": "context",
    "group": "microbatch_group_size_per_vp_stage",
    "layout": "pipeline_layout",
}


def _split(degree: str) -> tuple[str, str]:
    name, _, value = degree.partition("=")
    return name, f"'{value}'" if name == "layout" else value


def _batches(batch: str) -> list[str]:
    return [f"train.global_batch_size={batch}", "train.schedule.batch_ramp.tokens=0"] if batch else []


OVERLAPPED = "performance=deepseek performance.moe_token_dispatcher_type=alltoall"  # DeepEP is for GPUs
V3, MOONLIGHT, V2, LITE, PROXY = "v3_671b", "moonlight_16b", "v2_236b", "v2_lite", "v3_proxy"
DENSE, QWEN3 = "qwen2_5_7b", "qwen3_235b_a22b"
TABLE = [
    # DeepSeek-V3 and R1
    Row(V3, 2048, "PP=16 EP=64", [4]),
    Row(V3, 2048, "PP=16 VPP=2 EP=64", [2, 2]),
    Row(V3, 2048, "PP=16 VPP=2 EP=64 layout=Et*3|(tt|)*29,m|L", [3, 2]),
    Row(V3, 2048, "PP=16 VPP=2 EP=64 layout=Et*3|(tt|)*29,m|L", [3, 2], "15360", OVERLAPPED),
    Row(V3, 1024, "TP=2 PP=16 EP=64", [4], "4096"),
    Row(V3, 1024, "TP=2 PP=8 VPP=4 EP=64 layout=Et|(tt|)*30mL", [1, 2, 2, 2], "16384"),
    Row(V3, 256, "TP=2 PP=8 EP=32", [8], "4096"),
    Row(V3, 256, "PP=4 VPP=4 EP=64 layout=Et*4|(t*4|)*14tmL", [4, 4, 4, 4], "4096"),
    Row(V3, 256, "PP=2 VPP=8 EP=32 layout=Et*4|(t*4|)*14tmL", [4] * 8, "2048"),
    Row(V3, 4096, "PP=4 VPP=4 EP=32 layout=Et*4|(t*4|)*14tmL", [4, 4, 4, 4], "16384"),
    Row(V3, 256, "PP=8 VPP=4 EP=32", [2, 2, 2, 2]),
    Row(V3, 256, "TP=8 PP=16 EP=8", [4]),
    Row(V3, 512, "TP=8 PP=16 EP=16 ETP=2", [4], "4096"),
    Row(V3, 1024, "TP=4 PP=16 EP=64", [4]),
    Row(V3, 16384, "PP=16 EP=64", [4], "15360"),
    Row(V3, 16384, "TP=2 PP=16 VPP=2 EP=64", [2, 2], "16384"),
    Row(V3, 8192, "TP=2 PP=16 EP=64 CP=2", [4], "15360", "train.sequence_length=4096"),
    # Its relatives
    Row(PROXY, 1, "", [3]),
    Row(MOONLIGHT, 8, "EP=8", [27]),
    Row(MOONLIGHT, 16, "TP=2 EP=8", [27], "1024"),
    Row(MOONLIGHT, 64, "PP=4 EP=16", [7], "1024"),
    Row(LITE, 8, "EP=8", [27], "512"),
    Row(V2, 128, "PP=4 EP=32", [15], "1024"),
    Row(QWEN3, 512, "TP=4 PP=16 EP=8 CP=2", [6], "4096"),
    Row(DENSE, 1, "", [28], "512"),
    Row(DENSE, 8, "TP=4 PP=2", [14], "512"),
    # Refused
    Row(
        V3, 512, "TP=2 PP=16 EP=64", "parallel.expert=64: expert x expert_tensor x pipeline=1024 must divide 512 ranks"
    ),
    Row(V3, 2040, "PP=16 EP=64", "parallel.pipeline=16: tensor x pipeline x context=16 must divide the 2040 ranks"),
    Row(V3, 768, "PP=16 EP=48", "parallel.expert=48: must divide model.moe.num_experts=256"),
    Row(V3, 48, "TP=3 PP=16", "parallel.tensor=3: must divide model.num_attention_heads=128"),
    Row(V3, 2048, "PP=128 EP=16", "parallel.pipeline=128: must leave every stage but the last a layer"),
    Row(V3, 2048, "PP=16 VPP=8 EP=64", "parallel.virtual_pipeline=8: must leave every stage but the last a layer"),
    Row(V3, 16384, "PP=16 EP=64", "train.schedule.batch_ramp=3456: must be a multiple of the 1024"),
    Row(V3, 16384, "PP=16 VPP=2 EP=64", "train.micro_batch_size=1: must make at least parallel.pipeline=16", "15360"),
    Row(V3, 2048, "PP=16 VPP=2 EP=64 group=16", "parallel.microbatch_group_size_per_vp_stage=16: must leave none"),
    Row(V3, 2048, "PP=16 EP=64 layout=Et*3|(tt|)*29,m|L", "parallel.pipeline_layout=Et*3|(tt|)*29,m|L: must have 16"),
    Row(V3, 2048, "PP=16 EP=64", "needs parallel.virtual_pipeline above 1", "15360", "performance=deepseek"),
    Row(V3, 256, "TP=2 PP=8 EP=32 ETP=3", "parallel.expert_tensor=3: must divide model.moe.ffn_hidden_size=2048"),
    Row(MOONLIGHT, 128, "EP=128", "parallel.expert=128: must divide model.moe.num_experts=64"),
    Row(MOONLIGHT, 32, "PP=32", "parallel.pipeline=32: must leave every stage but the last a layer"),
    Row(QWEN3, 512, "TP=8 PP=16", "parallel.tensor=8: must divide model.attention.num_key_value_heads=4"),
    Row(DENSE, 8, "EP=8", "parallel.expert=8: must be 1: the model has no experts"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Row, Any]:
    """What one process found of all rows."""
    file = tmp_path_factory.mktemp("layouts") / "jobs"
    jobs = [{"ranks": row.gpus, "recipe": "pretrain_v3", "overrides": row.overrides} for row in TABLE]
    file.with_suffix(".json").write_text(json.dumps(jobs))
    program = Path(__file__).parents[1] / "support" / "fake_ranks.py"
    run_forked_to_the_end(program, file, seconds=220)
    return dict(zip(map(repr, TABLE), json.loads(file.with_suffix(".found.json").read_text()), strict=True))


pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.model}-{row.gpus}-{row.parallel}-{row.batch}")
def test_a_layout_is_built_as_it_says_or_refused(found, row):
    result = found[repr(row)]
    if isinstance(row.expected, str):
        assert row.expected in result.get("refused", "")
        return
    assert "held" in result, result
    held = result["held"]
    assert [len(layers) for layers in held["0"]["layers"]] == row.expected
    assert {stage: part["numbers"] for stage, part in held.items()} == result["expected"]
    print(f"{row.gpus} x {row.parallel}: numbers by pipeline rank {result['expected']}, {result['seconds']:.1f} s")


def test_layouts_are_examined_in_two_minutes(found):
    assert len(found) == len(TABLE) >= 40
    seconds = sum(result.get("seconds", 0.0) for result in found.values())
    print(f"{len(TABLE)} layouts in {seconds:.0f} s of a core")
    assert seconds < 120
