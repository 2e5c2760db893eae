"""A trainer and a real server that take turns: the server's memory, its weights by shared memory, and whole steps.

On a CPU a server gives nothing back, but it takes the calls, and dies of them in a wrong order just the same.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.sglang import PoolConfig, SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.model.build import native_tensors
from megatron_r1.rl.generation.rollouts import Rollout
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rl.placement import Colocated, Separate
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.sample import Sample
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.servers.memory import CACHE, WEIGHTS
from megatron_r1.rollout.sync.group_sender import GroupSender
from megatron_r1.rollout.sync.ipc_sender import IpcSender
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.strategies import DiskSync, GroupSync
from megatron_r1.train.offload import TrainerMemory
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.state import TrainState
from tests.support.attached import generate_raw
from tests.support.samples import logprobs_of, prompt_of, sample_of, tokens_of

pytestmark = [pytest.mark.sglang]
SHAPE = ModelConfig(init_std=0.08)
GREEDY = Sampling(0.0, 1.0, 8, (), 0)
ASKED = [Request(f"{n}", (5 + n, 6, 7 * n + 1)) for n in range(4)]
TIMEOUT_S = 60.0
MIB = 1 << 20
STEPS = 3


@pytest.fixture(scope="module")
def engine(new_model, tmp_path_factory):
    from megatron_r1.config.data import DataConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(num_documents=2000)).save(folder)
    config = SGLangConfig(
        max_running_requests=16, max_total_tokens=4096, request_timeout_s=TIMEOUT_S,
        pool=PoolConfig(health_interval_s=0.5),
    )  # fmt: skip
    model, logs = new_model(SHAPE, seed=9), tmp_path_factory.mktemp("logs")
    with (
        DiskSync(lambda: native_tensors(model), SHAPE, folder) as disk,
        SGLangEngine(disk.write(), config, logs, "cpu", "float32", context_length=256) as engine,
    ):
        yield engine


def push(engine: SGLangEngine, model, version: str, bucket_bytes: int = MIB) -> None:
    sender = IpcSender(engine.endpoints, "trainer", engine.tensor_parallel, "cpu", TIMEOUT_S)
    GroupSync(engine, sender, lambda: native_tensors(model), WeightPayload(SHAPE), bucket_bytes).push(version)


@torch.no_grad()
def disturbed(model, seed: int):
    noise = torch.Generator().manual_seed(seed)
    for _, tensor in native_tensors(model):
        tensor.add_(torch.randn(tensor.shape, generator=noise) * 0.02)
    return model


def shared_files() -> set[str]:
    """Shared memory made by this process or its servers: torch writes the process into the name."""
    this = psutil.Process()
    pids = {str(process.pid) for process in (this, *this.children(recursive=True))}
    return {path.name for path in Path("/dev/shm").glob("torch_*") if path.name.split("_")[1] in pids}


@pytest.mark.parametrize("bucket_bytes", [1, 100_000, 64 * MIB])
def test_shared_memory_and_a_group_bring_the_same_weights(engine, new_model, bucket_bytes):
    before, files = engine.checksums(), shared_files()
    model = disturbed(new_model(SHAPE), bucket_bytes)
    push(engine, model, f"shared-{bucket_bytes}", bucket_bytes)
    shared = engine.checksums()
    assert engine.version == f"shared-{bucket_bytes}" and all(shared[name] != before[name] for name in before)
    assert shared_files() == files, "shared memory is left behind"
    push(engine, new_model(SHAPE), "others")
    with GroupSender(engine.endpoints, "trainer", timeout_s=TIMEOUT_S) as sender:
        GroupSync(engine, sender, lambda: native_tensors(model), WeightPayload(SHAPE), MIB).push("group")
    assert engine.checksums() == shared


def test_no_order_of_calls_ends_the_server(engine, new_model):
    model = new_model(SHAPE)
    engine.resume_memory(CACHE)  # nothing was given back
    engine.release_memory()
    engine.release_memory()
    with pytest.raises(NoRolloutCapacity, match="trainer has the devices"):
        engine.generate(ASKED, GREEDY)
    with pytest.raises(NoRolloutCapacity, match="trainer has the devices"):
        push(engine, model, "too early")
    engine.resume_memory(WEIGHTS)
    engine.resume_memory(WEIGHTS)
    push(engine, model, "sent")
    with pytest.raises(NoRolloutCapacity, match="trainer has the devices"):
        engine.generate(ASKED, GREEDY)  # without a cache
    engine.resume_memory(CACHE)
    assert {one.weight_version for one in engine.generate(ASKED, GREEDY)} == {"sent"}
    engine.release_memory()
    engine.resume_memory(CACHE)
    engine.resume_memory(WEIGHTS)
    with pytest.raises(NoRolloutCapacity, match="need an update"):
        engine.generate(ASKED, GREEDY)  # on weights that nobody knows
    push(engine, model, "again")
    assert {one.weight_version for one in engine.generate(ASKED, GREEDY)} == {"again"}
    assert engine.restarts == 0


def test_what_a_server_still_generates_is_ended_first(engine, new_model):
    """Such as the answer to a call that was given up: SGLang dies when its memory is given back meanwhile."""
    push(engine, new_model(SHAPE), "busy")
    body = {"input_ids": [7, 8, 9], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}

    async def meanwhile() -> dict:
        started = asyncio.Event()
        answer = asyncio.ensure_future(generate_raw(engine.endpoints[0], body, started))
        await started.wait()
        await asyncio.to_thread(engine.release_memory)
        return (await answer)["meta_info"]

    seen = asyncio.run(meanwhile())
    assert seen["finish_reason"]["type"] == "abort" and 0 < seen["completion_tokens"] < 240
    engine.resume_memory([*WEIGHTS, *CACHE])
    assert engine.restarts == 0


class Asking:
    """Rollouts of greedy answers, so that two runs have the same; looks at the trainer's memory meanwhile."""

    def __init__(self, engine: SGLangEngine, model, offloaded: bool):
        self._engine, self._model, self._offloaded = engine, model, offloaded
        self.samples: list[Sample] = []
        self.busy_seconds = 0.0

    def take(self, step: int, first_prompt: int) -> Rollout:
        held = sum(tensor.untyped_storage().nbytes() for tensor in self._model.parameters())
        held += sum(p.main_grad.untyped_storage().nbytes() for p in self._model.parameters() if p.requires_grad)
        assert (held == 0) == self._offloaded
        samples = [
            sample_of(one, prompt_id=f"p{n}", group=n // 2, reward=float(sum(tokens_of(one)) % 2))
            for n, one in enumerate(self._engine.generate(ASKED, GREEDY))
        ]
        self.samples += samples
        return Rollout(samples, {})


def reinforced(engine: SGLangEngine, new_model, colocated: bool) -> tuple[list[Sample], dict[str, torch.Tensor]]:
    """The answers of some steps, and the weights after them."""
    config = RunConfig(model=SHAPE)
    config.rl.old_logprobs_from, config.rl.kl_coefficient, config.train.steps = "trainer", 0.0, STEPS
    config.train.schedule.warmup_steps, config.train.schedule.learning_rate = 0, 1e-3
    config.train.optimizer.max_grad_norm = 1.0
    model = new_model(SHAPE, seed=1)
    optimizer = Optimizer(model, config.train)
    placement = Colocated(TrainerMemory(model, optimizer)) if colocated else Separate()
    with placement.starting_servers():
        placement.attach(engine)
    rollouts, state = Asking(engine, model, colocated), TrainState()
    learner = Learner(config, model, optimizer, None, 0, "cpu")
    step = reinforcement_step(rollouts, learner, lambda version: push(engine, model, version), 1, placement)
    for number in range(STEPS):
        if colocated and number == 1:
            ended_in_the_trainers_turn(engine)
        state, row = step(state)
        assert row["mismatch/logprob_max_abs"] < 20  # tempered against greedy: the numbers are there
    if colocated:
        engine.resume_memory([*WEIGHTS, *CACHE])
    return rollouts.samples, {name: tensor.clone() for name, tensor in native_tensors(model)}


def ended_in_the_trainers_turn(engine: SGLangEngine) -> None:
    """Kill the server; it must not be started while the trainer has the memory."""
    os.killpg(engine.servers[0].process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not engine.restarts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert engine.has_dead_server and engine.servers[0].process.poll() is not None, (
        "it was started in the trainer's phase"
    )


def test_steps_in_turns_are_the_steps_of_an_engine_of_its_own(engine, new_model):
    separate, expected = reinforced(engine, new_model, colocated=False)
    restarts = engine.restarts
    colocated, weights = reinforced(engine, new_model, colocated=True)
    assert engine.restarts == restarts + 1 and not engine.has_dead_server
    told = [[(prompt_of(one), tokens_of(one), one.weight_version) for one in run] for run in (separate, colocated)]
    assert told[0] == told[1] and {one.weight_version for one in colocated} == {"0", "1", "2"}
    for here, there in zip(separate, colocated, strict=True):
        assert logprobs_of(here).tolist() == pytest.approx(logprobs_of(there).tolist(), abs=1e-5)
    moved = new_model(SHAPE, seed=1)
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in native_tensors(moved)), "nothing was learnt"
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
