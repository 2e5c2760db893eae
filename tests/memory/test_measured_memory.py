"""Predicted memory is what torch allocates on a CPU, in steps of pre-training and of reinforcement learning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.config.load import load, resolved
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.activations import ActivationSizes
from megatron_r1.memory.parts import MemoryParts
from megatron_r1.memory.trainer import STATES, job_memory, keeps_reference, largest_pass
from megatron_r1.platform.ports import reserve_ports
from tests.support.fork_server import run_forked_to_the_end

TOLERANCE = 0.1
SMALL = "model=small model.num_layers=3"
MODELS = {
    "tiny": "model=tiny train.micro_batch_size=4 train.global_batch_size=16",
    "small": f"{SMALL} train.micro_batch_size=1 train.global_batch_size=4 train.sequence_length=128",
}
RL = "rl.prompts_per_rollout=4 rl.group_size=4 rl.updates_per_rollout=1 rl.old_logprobs_from=trainer"
MODELS_RL = {
    "tiny": f"model=tiny rl.tokens_per_micro_batch=256 {RL}",
    "small": f"{SMALL} rl.tokens_per_micro_batch=128 {RL}",
}
EXPERT, RECOMPUTED = "parallel.expert=2", "performance.recompute_modules=[layernorm,moe_act]"
INTERLEAVED = f"{EXPERT} parallel.pipeline=2 parallel.virtual_pipeline=2 train.global_batch_size=64 model.num_layers=8"
OVERLAPPED = "model.dtype=bf16 performance.overlap_moe_expert_parallel_comm=true"
LAYOUTS: dict[int, dict[str, str]] = {
    1: {"one": ""},
    2: {
        "data": "",
        "recomputed": RECOMPUTED,
        "tensor": "parallel.tensor=2",
        "pipeline": "parallel.pipeline=2",
        "expert": EXPERT,
        "expert tensor": "parallel.expert_tensor=2",
        "both tensor": "parallel.tensor=2 parallel.expert_tensor=2",
        "context": "parallel.context=2",
        "overlapped": f"{EXPERT} {OVERLAPPED}",
    },
    4: {"interleaved": INTERLEAVED, "interleaved, overlapped": f"{INTERLEAVED} {OVERLAPPED}"},
}
"""Number of ranks -> layouts in pre-training."""
LAYOUTS_RL: dict[int, dict[str, str]] = {
    1: {"grpo": ""},
    2: {
        "grpo, data": "",
        "grpo, tensor": "parallel.tensor=2",
        "grpo, pipeline": "parallel.pipeline=2",
        "grpo, expert": EXPERT,
    },
    4: {},
}
"""The same in reinforcement learning, with a reference policy."""
OTHERS: dict[int, dict[str, tuple[str, str]]] = {
    1: {
        "tiny, recomputed": ("pretrain", f"{MODELS['tiny']} {RECOMPUTED}"),
        "tiny, critic": ("grpo", f"{MODELS_RL['tiny']} rl.advantage_estimator=critic"),
    },
    2: {},
    4: {},
}
LEFT = {False: 6, True: 16}
"""Hidden states of a micro-batch, and their gradients, that stay until the next step: buffers of ranks' tokens, what
the last pass got and gave; more where passes overlap in nodes of their own."""


def jobs_of(ranks: int) -> Iterator[tuple[str, tuple[str, RunConfig]]]:
    """Names of jobs with their verbs and configurations; four ranks' are of the tiny model alone."""
    for model in MODELS if ranks < 4 else ("tiny",):
        for name, layout in LAYOUTS[ranks].items():
            yield f"{model}, {name}", ("pretrain", load("pretrain", f"{MODELS[model]} {layout}".split()))
        for name, layout in LAYOUTS_RL[ranks].items():
            yield f"{model}, {name}", ("grpo", load("grpo", f"{MODELS_RL[model]} {layout}".split()))
    for name, (verb, overrides) in OTHERS[ranks].items():
        yield name, (verb, load(verb, overrides.split()))


def predicted(config: RunConfig, verb: str, ranks: int) -> list[MemoryParts]:
    """The trainer's memory with the reference policy, which is in host memory as all is here."""
    degrees = config.parallel
    work = largest_pass(config, verb, ranks // (degrees.tensor * degrees.pipeline * degrees.context))
    stages = job_memory(config, verb, ranks, work, gpu=False)
    for stage in stages:
        stage.add("reference policy", stage.of("weights") * keeps_reference(config, verb))
    return stages


@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))])
def test_predicted_memory_is_what_torch_allocates(ranks: int, tmp_path: Path) -> None:
    jobs = dict(jobs_of(ranks))
    described = {
        name: {"verb": verb, "config": resolved(config), "port": port}
        for (name, (verb, config)), port in zip(jobs.items(), reserve_ports(len(jobs)), strict=True)
    }
    (tmp_path / "job.json").write_text(json.dumps(described))
    run_forked_to_the_end(Path(__file__).with_name("ranks_memory.py"), tmp_path, ranks=ranks, seconds=800)
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    wrong = []
    for name, (verb, config) in jobs.items():
        stages = predicted(config, verb, ranks)
        hidden = ActivationSizes(config, gpu=False).hidden_states() * config.parallel.tensor
        left = LEFT[config.performance.overlap_moe_expert_parallel_comm] * largest_pass(config, verb, 1).tokens * hidden
        for rank in range(ranks):
            expected, found = stages[rank * len(stages) // ranks], measured[rank][name]
            states = expected.of(*STATES, "critic", "reference policy")
            errors = states / found["updated"] - 1, expected.total / found["peak"] - 1
            print(f"{name}, rank {rank}: {errors[0]:+.1%} after a step, {errors[1]:+.1%} at its peak")
            right = states == pytest.approx(found["updated"], rel=0.02, abs=left)
            if not (right and expected.total == pytest.approx(found["peak"], rel=TOLERANCE)):
                wrong.append((name, rank, states, expected.text(), found))
    assert not wrong
