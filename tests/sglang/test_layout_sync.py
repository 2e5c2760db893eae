"""Trainers of several layouts fill two real servers, and one of two ranks, with the same bits, by the planned sends.

All layouts send to servers that run already, whose addresses are in a file, as in a run with engines of its own nodes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.sglang import ServerConfig, SGLangConfig
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sync.model_folder import write_shape
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.plan.layout import predicted
from megatron_r1.rollout.sync.plan.traffic import StageTraffic, traffic
from tests.support.attached import BUCKET, announced
from tests.support.fork_server import run_forked_to_the_end
from tests.support.layouts import model_of

pytestmark = [pytest.mark.sglang, pytest.mark.dist]
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2-ep2": (4, {"tensor": 2, "expert": 2}),
}
SHAPE = model_of("tiny")
SERVERS, WIDE = 2, 2
FLAG = 4
"""Bytes of the flag by which senders take turns."""


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory):
    """A model's shape to start servers on: all that they serve is sent to them."""
    from megatron_r1.config.data import DataConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(num_documents=2000)).save(folder)
    return write_shape(tmp_path_factory.mktemp("shape"), WeightPayload(SHAPE), folder)


def fill(engine: SGLangEngine, name: str, folder: Path, updates: int) -> dict:
    """Let a trainer in a layout send its weights to the engine's servers; returns what its ranks saw."""
    ranks, degrees = LAYOUTS[name]
    folder = folder / name
    folder.mkdir()
    job = {
        "parallel": degrees,
        "updates": updates,
        "tensor_parallel": engine.tensor_parallel,
        "refused": name == "pp2",
    }
    (folder / "job.json").write_text(json.dumps(job))
    with announced(folder / "servers", engine.endpoints):
        run_forked_to_the_end(Path(__file__).with_name("ranks_sync.py"), folder, ranks=ranks, seconds=240)
    seen = json.loads((folder / "seen.json").read_text())
    print(f"{name}: largest log-prob difference over {updates} updates {max(seen['gaps']):.1e}")
    assert len(seen["gaps"]) == updates and 0 < max(seen["gaps"]) < 1e-4
    for sums in seen["checksums"]:
        assert all(one == sums[0] for one in sums), "two servers differ"
    return seen


def plan_of(name: str) -> list[StageTraffic]:
    ranks, degrees = LAYOUTS[name]
    everything, stages = predicted(SHAPE, ParallelConfig(**degrees), ranks)
    return traffic(everything, stages, WeightPayload(SHAPE), BUCKET)


def planned_sends(name: str, receivers: int) -> list[dict[str, int]]:
    """By rank, what CountedSends of ranks_sync.py must have counted."""
    sends: list[dict[str, int]] = [{} for _ in range(LAYOUTS[name][0])]
    for stage in plan_of(name):
        sends[stage.leader] |= {"buckets": len(stage.buckets), "broadcast": stage.nbytes, "receivers": receivers}
        for rank, size in stage.gathered.items():
            sends[rank] |= {f"to {stage.leader}": size}
    return sends


@pytest.fixture(scope="module")
def one_layout(start_folder, tmp_path_factory):
    """Checksums of two servers after updates from one rank, and the engine for the other layouts."""
    config = SGLangConfig(servers=SERVERS, max_running_requests=16, max_total_tokens=4096)
    folder = tmp_path_factory.mktemp("layouts")
    with SGLangEngine(start_folder, config, folder / "logs", "cpu", "float32", context_length=64) as engine:
        yield engine, folder, fill(engine, "one", folder, 2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_fills_the_servers_alike_and_sends_what_was_planned(one_layout, name):
    engine, folder, alone = one_layout
    seen = alone if name == "one" else fill(engine, name, folder, 2)
    assert seen["checksums"] == alone["checksums"]
    assert seen["checksums"][0] != seen["checksums"][1]
    assert seen["sent"] == planned_sends(name, SERVERS)
    largest = max(size for stage in plan_of(name) for size in stage.buckets)
    print(f"{name}: new tensors of {max(seen['live'])} bytes, {max(seen['live']) / largest:.2f} of the largest bucket")
    assert max(seen["live"]) <= 2 * largest + FLAG
    if name == "pp2":
        own, other = seen["refused"]
        assert re.search("Cannot connect|did not join its group", own) and "another sender" in other


@pytest.mark.timeout(600)
def test_a_server_of_two_ranks(start_folder, tmp_path):
    server = ServerConfig(tensor_parallel=WIDE)
    config = SGLangConfig(max_running_requests=16, max_total_tokens=4096, server=server)
    with SGLangEngine(start_folder, config, tmp_path / "logs", "cpu", "float32", context_length=64) as engine:
        seen = fill(engine, "tp2-ep2", tmp_path, 2)
        assert seen["sent"] == planned_sends("tp2-ep2", WIDE)
        assert {name.rpartition("@")[2] for name in seen["checksums"][0][0]} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["tp2-ep2", "pp2"])
def test_twenty_updates(start_folder, tmp_path, name):
    config = SGLangConfig(servers=SERVERS, max_running_requests=16, max_total_tokens=4096)
    with SGLangEngine(start_folder, config, tmp_path / "logs", "cpu", "float32", context_length=64) as engine:
        seen = fill(engine, name, tmp_path, 20)
    assert len({json.dumps(sums, sort_keys=True) for sums in seen["checksums"]}) == 20
