"""The plan of a weight sync, by hand and against the published size of DeepSeek-V3."""

import re
import sys
from math import prod
from pathlib import Path

import pytest

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.plan.cost import Cluster, predict
from megatron_r1.rollout.sync.plan.layout import expert_number, predicted
from megatron_r1.rollout.sync.plan.traffic import Engines, StageTraffic, needed_by_a_rank, traffic
from tests.support.layouts import model_of, te_layout

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))


@pytest.mark.parametrize("shape", ["tiny", "direct_query", "grouped_experts"])
@pytest.mark.parametrize("degrees", [{"tensor": 2, "expert": 2}, {"tensor": 2, "expert_tensor": 2}, {"tensor": 2}])
def test_ranks_hold_what_transformer_engine_gives_them(shape, degrees):
    """Against the stored list: shapes of the parts, how many there are, and who holds an expert."""
    model, parallel = model_of(shape), ParallelConfig(**degrees)
    everything, _ = predicted(model, parallel, 2 * parallel.expert)
    stored = te_layout(shape)
    assert {name for name in everything if not name.endswith("expert_bias")} | {
        name for name in stored if name.endswith("expert_bias")
    } == stored.keys()
    for name, (whole, parts) in everything.items():
        entry, shares = stored[name], parallel.tensor if expert_number(name) is None else parallel.expert_tensor
        assert whole == entry.shape
        local = entry.local_shape(shares)
        held = (
            sum(part.shape[entry.split] for part in parts if part.rank == parts[0].rank)
            if entry.split is not None
            else 0
        )
        if entry.split is None:
            assert [part.shape for part in parts] == [local]
        else:
            assert held == local[entry.split] and len(parts) == shares * entry.parts
        if entry.expert is not None:
            ranks = {part.rank // parallel.expert_tensor for part in parts}
            assert ranks == {entry.expert * parallel.expert // model.moe.num_experts}


def test_pipeline_stages_hold_their_layers():
    everything, stages = predicted(ModelConfig(), ParallelConfig(pipeline=2, virtual_pipeline=2), 4)
    assert stages == [0, 0, 1, 1]
    rank = {name: parts[0].rank for name, (_, parts) in everything.items()}
    assert [rank[f"decoder.layers.{layer}.self_attention.linear_proj.weight"] for layer in range(4)] == [0, 2, 0, 2]
    assert rank["embedding.word_embeddings.weight"] == 0
    assert rank["output_layer.weight"] == rank["mtp.layers.0.eh_proj.weight"] == 2
    uneven = ParallelConfig(pipeline=2, pipeline_layers=[3, 1])
    assert predicted(ModelConfig(), uneven, 2)[0]["decoder.layers.2.self_attention.linear_proj.weight"][1][0].rank == 0
    apart = ParallelConfig(pipeline=3, pipeline_layout="Ett|ttm|L")
    rank = {name: parts[0].rank for name, (_, parts) in predicted(ModelConfig(), apart, 3)[0].items()}
    assert [
        rank["decoder.final_layernorm.weight"],
        rank["mtp.layers.0.eh_proj.weight"],
        rank["output_layer.weight"],
    ] == [1, 1, 2]
    with pytest.raises(ConfigError, match="parallel.pipeline=6: must leave every stage but the last a layer"):
        predicted(ModelConfig(), ParallelConfig(pipeline=6), 6)
    with pytest.raises(ConfigError, match="parallel.expert=3: must divide the 8 experts"):
        predicted(ModelConfig(), ParallelConfig(expert=3), 3)


def test_traffic_of_a_small_model_by_hand():
    model = model_of("tiny")
    parallel = ParallelConfig(tensor=2)
    everything, stages = predicted(model, parallel, 2)
    (stage,) = traffic(everything, stages, WeightPayload(model), 100_000)
    stored = te_layout("tiny")
    sent = {name: entry for name, entry in stored.items() if not name.startswith("mtp.")}
    sizes = {name: 4 * prod(entry.shape) for name, entry in sent.items()}
    assert stage.leader == 0 and stage.nbytes == sum(sizes.values())
    # Of what both share rank 1 sends its half, and of experts nothing: it holds copies of them.
    halves = [sizes[name] // 2 for name, entry in sent.items() if entry.split is not None and entry.expert is None]
    assert stage.gathered == {1: sum(halves)}
    large = {512 * 128 * 4, 128 * 256 * 4}  # embedding, head, gate with up; down: alone in their buckets
    assert {size for size in stage.buckets if size > 100_000} == large


def test_turns_overlap_gathering_with_others_sending():
    gb, cluster = 10**9, Cluster(gpus_per_node=2, intra_node_gbs=10, inter_node_gbs=1, latency_s=0.5, bucket_s=0.25)
    # Each gathers 2 GB from its own node in 0.2 s and two messages of 0.5 s, and sends two buckets of 1 GB.
    stages = [StageTraffic(leader, {leader + 1: 2 * gb}, 2, [gb, gb]) for leader in (0, 2)]
    found = predict(stages, 4, needed=3 * gb, cluster=cluster)
    assert found.gather_s == pytest.approx(1.2) and found.broadcast_s == pytest.approx(4 * 1.25)
    assert found.total_s == pytest.approx(0.6 + 5.0)  # only the first bucket is waited for
    assert found.bound_receive_s == pytest.approx(3.0) and found.bound_send_s == pytest.approx(1.0)
    assert found.bound_s == pytest.approx(3.0)
    alone = predict(stages[:1], 2, needed=0, cluster=cluster)
    assert alone.total_s == pytest.approx(1.2 + 2.5)  # nobody else sends meanwhile
    far = [StageTraffic(0, {2: 2 * gb}, 0, [gb])]
    assert predict(far, 4, needed=0, cluster=cluster).gather_s == pytest.approx(2.0)


def test_a_servers_rank_keeps_its_share():
    model = model_of("tiny")
    payload = WeightPayload(model)
    all_of_it = needed_by_a_rank(payload, Engines())
    assert all_of_it == sum(item.nbytes for name in payload.names() for item in payload.entries(name))
    whole = sum(4 * prod(e.shape) for n, e in te_layout("tiny").items() if e.split is None and not n.startswith("mtp."))
    assert needed_by_a_rank(payload, Engines(1, 2)) == whole + (all_of_it - whole) // 2


def test_the_program_plans_deepseek_v3(capsys, monkeypatch):
    import plan_sync

    degrees = ["tensor=8", "pipeline=16", "expert=64", f"pipeline_layers={[3, *[4] * 14, 2]}"]
    options = ["--ranks", "1024", "--engines", "4", "--engine-tensor", "16", "--slices", r"layers\.3\.\S*linear_proj"]
    monkeypatch.setattr(sys, "argv", ["plan_sync.py", *degrees, *options])
    assert plan_sync.main() == 0
    told = capsys.readouterr().out
    # 671,026,419,200 parameters in bf16, of which 58 x 256 balancing biases in fp32.
    assert re.search(rf"in all \d+ buckets, {2 * 671_026_419_200 + 2 * 58 * 256} bytes\n", told)
    assert "received: " in told and "by each of the 64 ranks of 4 servers" in told
    assert "decoder.layers.3.self_attention.linear_proj.weight [7168, 16384] -> rank 64 -> " in told
    assert "    rank 71 [0:7168, 14336:16384]\n" in told and "rank 64 [0:7168, 0:2048] (there already)" in told
    assert "predicted " in told and "lower bound " in told
    monkeypatch.setattr(sys, "argv", ["plan_sync.py", "pipeline=64"])
    assert plan_sync.main() == 2
    assert (
        "parallel.pipeline=64: must leave every stage but the last a layer of model.num_layers=61"
        in capsys.readouterr().err
    )
