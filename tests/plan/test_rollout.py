"""Seconds of reinforcement learning: rollout, sync, in turns and ahead, published steps, and the division of nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.config.nodes import JobNodes, nodes_of
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.decode import DecodeCost, ServerGpus, decoder, engines_of, kernels, rollout_seconds, with_engines
from megatron_r1.plan.handover import memory_seconds, reference_seconds, sync_seconds
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.published_rl import BOUNDS, ROLLOUTS, VLLM
from megatron_r1.plan.responses import Responses
from megatron_r1.plan.rollout import RolloutStep, rl_step, update_of
from megatron_r1.plan.serving import FIRST_FIT, NO_PACKING, UNCERTAINTY, RolloutStack, ServingConstants
from megatron_r1.rollout.sync.payload import WeightPayload

CONSTANTS, H100, SERVING, OWN = Constants(), GPUS["H100"], ServingConstants(), RolloutStack()
QWEN = ["model=qwen2_5_7b", "init.from=x", "rollout.max_response_tokens=4096", "model.max_sequence_length=8192",
        "rl.tokens_per_micro_batch=8192", "rollout.sglang.max_total_tokens=0"]  # fmt: skip
R1 = ["model=v3_671b", *QWEN[1:], "rollout.sglang.server.quantization=fp8"]


@pytest.fixture(scope="module")
def steps() -> list[RolloutStep]:
    """Of the published steps, as predicted."""
    return [row.predicted(CONSTANTS) for row in ROLLOUTS]


def test_lengths_have_the_mean_and_the_longest_that_are_given() -> None:
    found = Responses(64, 1000, 3000, 100)
    lengths = [found.length_at((index + 0.5) / 1000) for index in range(1000)]
    assert sum(lengths) / 1000 == pytest.approx(1000, rel=0.01) and max(lengths) == 3000
    assert lengths == sorted(lengths) and lengths[0] < 200


def test_micro_batches_hold_whole_responses() -> None:
    """Two of 600 tokens do not share 1,000, and short ones fill the gaps that first fit finds and next fit leaves."""
    even = Responses(512, 500, 500, 100)
    assert even.micro_batches(1000) == even.micro_batches(1000, NO_PACKING) == 512
    assert even.micro_batches(1200) == 256
    uneven = Responses(512, 600, 1900, 100)
    least = uneven.tokens / 2000
    assert least < uneven.micro_batches(2000, FIRST_FIT) < uneven.micro_batches(2000) < 512


def test_an_update_has_the_tokens_of_the_responses() -> None:
    config = load("grpo", [*QWEN, "rl.updates_per_rollout=1"])
    responses = Responses(2048, 1000, 4000, 100)
    update = update_of(TrainingJob(config, H100, 8), "grpo", responses).config.train
    assert update.global_batch_size * update.sequence_length == pytest.approx(responses.tokens, rel=0.1)
    padded = update_of(TrainingJob(config, H100, 8), "grpo", responses, replace(VLLM, packing=NO_PACKING))
    assert padded.config.train.global_batch_size == 2048


def server(overrides: list[str], gpu: str, tensor: int = 1, stack: RolloutStack = OWN) -> DecodeCost:
    config = with_engines(load("grpo", overrides), ServerGpus(tensor, tensor))
    return decoder(config, GPUS[gpu], tensor, CONSTANTS, SERVING, stack)


def test_a_small_batch_takes_the_time_of_reading_the_weights() -> None:
    found = server(QWEN, "H100")
    launches = 10 * 28 * SERVING.kernel
    assert kernels(load("grpo", QWEN).model) == 280
    assert found.seconds(1, 100) == pytest.approx(7.6e9 * 2 / (SERVING.memory * 3.35e12) + launches, rel=0.05)
    cache = 64 * 8000 * 28 * 2 * 4 * 128 * 2 / (SERVING.memory * 3.35e12)
    more = found.seconds(64, 8000) - found.seconds(1, 100)
    assert more == pytest.approx(cache + 2 * 7.6e9 * 63 / (CONSTANTS.matrix * 989.4e12), rel=0.05)


def test_the_host_is_hidden_or_added() -> None:
    hidden, added = server(QWEN, "H100"), server(QWEN, "H100", stack=VLLM)
    host = SERVING.step + 8 * SERVING.sequence
    assert added.seconds(8, 100) - hidden.seconds(8, 100) == pytest.approx(host)
    assert replace(hidden, host=1.0).seconds(8, 100) == pytest.approx(1 + 8 * SERVING.sequence)


def test_without_cuda_graphs_the_host_launches_every_kernel() -> None:
    graphs, none = server(QWEN, "H100"), server([*QWEN, "rollout.sglang.server.cuda_graph=false"], "H100")
    assert none.fixed - graphs.fixed == pytest.approx(280 * (CONSTANTS.launch - SERVING.kernel))


@pytest.mark.parametrize(
    ("gpu", "tensor", "batch", "published", "within"),
    [("H200", 8, 8, 12.8e-3, 0.1), ("H200", 8, 16, 17.2e-3, 0.1), ("H200", 8, 32, 25.6e-3, 0.2),
     ("H200", 8, 64, 34.6e-3, 0.25), ("H100", 16, 1, 23.1e-3, 0.25)],
)  # fmt: skip
def test_r1_on_sglang_decodes_about_as_fast_as_others_measured(
    gpu: str, tensor: int, batch: int, published: float, within: float
) -> None:
    """Mean seconds per token, not fitted: InferenceX, issue 870 (1,024 tokens in and out, beside new prompts); and
    tt-inference-server, issue 356 (two nodes).
    """
    assert server(R1, gpu, tensor).seconds(batch, 1536) == pytest.approx(published, rel=within)


def test_servers_that_span_nodes_wait_for_the_network() -> None:
    config = load("grpo", [*QWEN, "model=v3_671b"])
    waits = {
        (gpu, tensor): server([*QWEN, "model=v3_671b"], gpu, tensor).fixed - kernels(config.model) * SERVING.kernel
        for gpu in ("H100", "GB200")
        for tensor in (4, 8, 16, 32)
    }
    assert waits["H100", 32] - waits["H100", 16] == pytest.approx(2 * 61 * SERVING.network)
    assert waits["H100", 8] < 0.2 * waits["H100", 16] and waits["GB200", 4] == waits["H100", 4]
    assert waits["H100", 8] < waits["GB200", 8] == waits["GB200", 32] < waits["H100", 16]


def test_a_rollout_waits_for_its_longest_response() -> None:
    config = load("grpo", QWEN)
    even = Responses(64, 1000, 1000, 100)

    def seconds(gpus: int, responses: Responses) -> float:
        return rollout_seconds(config, H100, ServerGpus(gpus, 1), responses, CONSTANTS, SERVING, OWN)

    assert seconds(8, replace(even, longest=4000)) > 2 * seconds(8, even) > 2 * seconds(16, even)
    assert seconds(8, even) == pytest.approx(1000 * server(QWEN, "H100").seconds(8, 600), rel=0.05)


@pytest.mark.parametrize("model", ["v3_671b", "qwen2_5_7b"])
def test_sync_sends_as_many_bytes_as_the_weights_have(model: str) -> None:
    config = load("grpo", [*QWEN, f"model={model}"])
    payload = WeightPayload(config.model)
    nbytes = sum(entry.nbytes for name in payload.names() for entry in payload.entries(name))
    found = sync_seconds(config, H100, 64, SERVING, OWN)
    assert found * SERVING.link * H100.network == pytest.approx(nbytes, rel=0.01)


def test_colocated_trainers_move_weights_and_optimizer() -> None:
    """8 ranks with all weights of 7.6e9 parameters: bf16 there and back, and an eighth of the optimizer."""
    overrides = [*QWEN, "rollout.placement=colocated", "rollout.weight_sync.method=ipc", "rl.kl_coefficient=0.01"]
    job = TrainingJob(load("grpo", overrides), H100, 8)
    moved = 2 * 7.6e9 * (2 + 12 / 8)
    assert memory_seconds(job, OWN) == pytest.approx(moved / (0.8 * 64e9), rel=0.02)
    assert memory_seconds(job, VLLM) == pytest.approx(moved / VLLM.pageable_bytes, rel=0.02)
    assert reference_seconds(job, VLLM) == pytest.approx(3 * 7.6e9 * 2 / VLLM.pageable_bytes, rel=0.02)
    apart = replace(job, config=load("grpo", [*QWEN, "rl.kl_coefficient=0"]))
    assert memory_seconds(apart, OWN) == reference_seconds(apart, OWN) == 0


def test_ahead_a_step_takes_the_longer_of_sampling_and_training() -> None:
    turns = rl_step(TrainingJob(load("grpo", QWEN), H100, 8), ServerGpus(8, 1), CONSTANTS)
    ahead = replace(turns, ahead=True)
    assert ahead.total == max(turns.rollout, turns.training) + turns.sync < turns.total
    assert 0 < ahead.trainer_idle < turns.trainer_idle < 1 and ahead.engine_idle < turns.engine_idle
    parts = RolloutStep(rollout=8, rewards=1, logprobs=2, update=4, sync=3, memory=2, ahead=False)
    assert parts.total == 20 and replace(parts, ahead=True).total == 9 + 3
    assert replace(parts, ahead=True, in_flight=True).total == 2 + 4 + 2 + 3


def test_a_host_that_waits_for_the_gpu_adds_its_seconds() -> None:
    """With alltoall it learns from the GPU how many tokens experts get; a slower host then takes longer, twice over."""
    overrides = ["model=qwen3_30b_a3b", *QWEN[1:], "parallel.expert=8"]
    job = TrainingJob(load("grpo", overrides), H100, 8)
    slow = replace(job, gpu=replace(H100, host_slowness=2.0))
    hybrid = replace(job, config=load("grpo", [*overrides, "performance.moe_token_dispatcher_type=hybridep"]))
    once, twice, ahead = (rl_step(one, ServerGpus(8, 1), CONSTANTS).update for one in (job, slow, hybrid))
    assert ahead < once < twice < 2 * once


def test_servers_are_as_small_as_their_weights_allow() -> None:
    """V3 in bf16 has 1.34 TB."""
    large = load("grpo", [*QWEN, "model=v3_671b"])
    assert engines_of(load("grpo", QWEN), H100, 64).tensor == 1
    assert engines_of(large, H100, 64).tensor == 32 and engines_of(large, GPUS["H200"], 64).tensor == 16


def test_published_steps_are_within_the_stated_uncertainty_but_for_one(steps: list[RolloutStep]) -> None:
    """README.md of the package says how far off that one is."""
    errors = {f"{row.name}, {row.gpus} {row.gpu}": step.total / row.seconds - 1
              for row, step in zip(ROLLOUTS, steps, strict=True)}  # fmt: skip
    print({name: f"{error:+.0%}" for name, error in errors.items()})
    outside = {name for name, error in errors.items() if abs(error) > UNCERTAINTY}
    assert len(ROLLOUTS) == 28
    assert outside <= {"V3, DAPO-Math, 96 H20"}
    assert all(abs(error) < 0.4 for error in errors.values())
    assert sum(abs(error) < 0.2 for error in errors.values()) >= 20


def test_parts_of_published_steps_are_near(steps: list[RolloutStep]) -> None:
    found = {
        (row.name, part): (step.sync + step.memory if part == "handover" else getattr(step, part)) / seconds
        for row, step in zip(ROLLOUTS, steps, strict=True)
        for part, seconds in row.parts.items()
    }
    assert len(found) == 10 and all(0.7 < ratio < 1.4 for ratio in found.values()), found


def test_no_prediction_exceeds_a_bound_that_a_nightly_test_holds() -> None:
    assert len(BOUNDS) == 9
    for row in BOUNDS:
        assert row.predicted(CONSTANTS).total < row.seconds, row.name


def test_a_plan_divides_the_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*QWEN, "gpu=h100", "gpus=32", f"root={tmp_path}", "name=rl"]
    assert exit_code(["plan", "grpo", *command]) == 0
    plan = orjson.loads((tmp_path / "rl/plan/plan.json").read_bytes())
    found = plan["reinforcement"]
    assert 1 <= found["engine_nodes"] <= 3 and plan["nodes"] == 4
    assert f"engine_nodes={found['engine_nodes']}" in plan["submit"]
    phases = found["phases"]
    alone = sum(phases[name] for name in ("rollout", "rewards", "logprobs", "update", "sync", "memory"))
    assert found["step_seconds"] == pytest.approx(alone)
    assert "weight sync" in capsys.readouterr().out


def test_on_one_node_trainer_and_servers_have_gpus_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*QWEN, "gpu=h100", "gpus=8", f"root={tmp_path}", "name=rl"]
    assert exit_code(["plan", "grpo", *command]) == 0
    plan = orjson.loads((tmp_path / "rl/plan/plan.json").read_bytes())
    found, arguments = plan["reinforcement"], plan["submit"]
    assert found["engine_nodes"] == 0 and found["engine_gpus"] in (1, 2, 4, 6) and plan["nodes"] == 1
    assert f"on {found['engine_gpus']} GPUs of the same node" in " ".join(capsys.readouterr().out.split())
    ranks = 8 - found["engine_gpus"]
    assert {f"cluster.ranks_per_node={ranks}", "cluster.gpus_per_node=8", "nodes=1"} <= {*arguments}
    rollout = load("grpo", [*QWEN, *(line for line in arguments if line.startswith("rollout.sglang.server"))]).rollout
    assert rollout.sglang.servers * rollout.sglang.server.tensor_parallel == found["engine_gpus"]
    assert nodes_of(rollout, ranks, ranks, 8) == JobNodes(trainer=1), "what `check` and a run hold servers to"


def test_servers_that_share_the_trainers_gpus_are_on_its_first_node(tmp_path: Path) -> None:
    command = [*QWEN, "rollout.placement=colocated", "rollout.sglang.server.memory_saver=true"]
    assert exit_code(["plan", "grpo", *command, "gpu=h100", "gpus=16", f"root={tmp_path}", "name=rl"]) == 0
    plan = orjson.loads((tmp_path / "rl/plan/plan.json").read_bytes())
    found, arguments = plan["reinforcement"], plan["submit"]
    assert (plan["nodes"], found["engine_nodes"], found["engine_gpus"], found["engines"]["gpus"]) == (2, 0, 0, 8)
    rollout = load("grpo", [*command, *(one for one in arguments if one.startswith("rollout.sglang.server"))]).rollout
    assert rollout.sglang.servers * rollout.sglang.server.tensor_parallel == 8
    assert nodes_of(rollout, 16, 8, 8) == JobNodes(trainer=2)


def test_where_no_trainer_fits_the_plan_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model=v3_671b", *QWEN[1:], "gpu=h100", "gpus=32", f"root={tmp_path}", "parallel.expert=8"]
    assert exit_code(["plan", "grpo", *command]) == 2
    refused = [*QWEN, "gpu=h100", "gpus=16", f"root={tmp_path}", "rollout.max_response_tokens=8192"]
    assert exit_code(["plan", "grpo", *refused]) == 2  # by a rule that no layout satisfies
    shown = capsys.readouterr()
    assert "must be below model.max_sequence_length=8192" in shown.err
    assert "GB where 79 are" in " ".join(shown.out.split())
