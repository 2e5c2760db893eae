"""Every check refuses a broken job, in seconds and with the change that mends it; sound jobs pass all of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_r1.check import slurm, storage
from megatron_r1.check.finding import State
from megatron_r1.check.layout_files import layout_files, layout_jobs
from megatron_r1.check.run import CHECKS, Report, check_command
from megatron_r1.check.slurm import Partition
from megatron_r1.config.check import NUM_CHECKS
from megatron_r1.config.load import load
from megatron_r1.config.recipes import recipes
from megatron_r1.config.verbs import VERBS, JobCommand
from tests.support.hf_folders import write_folder_of

DEADLINE_S = 5.0
RECIPES = {
    **dict.fromkeys(("quickstart", "r1_tiny", "smollm"), ""),
    **dict.fromkeys(("gsm8k_qwen", "r1_16b"), "check.gpu=H100"),
    "r1_671b": "check.gpu=H200",
}
"""Recipe of several stages -> the machine for which it is meant."""
FREE = {"full": 1e3, "tight": 25e6, "narrow": 300e6}
"""Bytes of disks with room for nothing; for one checkpoint of `tiny` and a half; for one rollout, and not for all."""
V3 = (
    "pretrain pretrain_v3 model=v3_671b parallel=v3_671b fp8=deepseek check.ranks=2048 check.gpu=H800 "
    "performance.recompute_modules=[layernorm,mla_up_proj,moe_act]"
)
RL = "grpo r1_zero init.from=hf:{model}"
V3_RL = f"{RL} rollout=sglang model=v3_671b check.gpu=H100 check.ranks=1"
BROKEN = [
    (1, "pretrain pretrain train.stepz=3", "did you mean train.steps"),
    (1, f"{RL} rollout=sglang rollout.max_staleness=1 rl.old_logprobs_from=trainer", "must be rollout with"),
    (2, "pretrain pretrain parallel.tensor=2 check.ranks=3", "must divide the 3 ranks"),
    (2, "pretrain pretrain check.ranks=12 check.gpu=H100 train.global_batch_size=12 train.micro_batch_size=1",
     "take a multiple of 8"),
    (2, "pretrain pretrain check.ranks=16 check.nodes=1 check.gpu=H100 train.global_batch_size=16 "
        "train.micro_batch_size=1", "take check.nodes=2"),
    (3, "pretrain pretrain parallel.pipeline=8 check.ranks=8", "model.num_layers=4"),
    (4, "pretrain pretrain parallel.tensor=8 check.ranks=8", "must divide model.num_attention_heads=4"),
    (5, "pretrain pretrain parallel.expert=3 check.ranks=3", "must divide model.moe.num_experts=8"),
    (6, "pretrain pretrain parallel.expert_tensor=3 check.ranks=3", "must divide model.moe.ffn_hidden_size=64"),
    (7, "pretrain pretrain train.sequence_length=130 parallel.context=4 check.ranks=4", "must divide"),
    (7, "pretrain pretrain train.sequence_length=512", "at most model.max_sequence_length=256"),
    (8, "pretrain pretrain check.ranks=3", "must be a multiple of the 3 data-parallel ranks"),
    (9, f"{V3} train.schedule.batch_ramp.increment=1000", "must divide"),
    (9, f"{V3} train.schedule.batch_ramp.tokens=20e12", "never reaches"),
    (10, f"{V3} train.steps=3000", "take more train.steps"),
    (11, f"{V3} model.rope.factor=2 model.rope.original_max_position=1024", "take model.rope.factor=4"),
    (12, f"{V3} check.gpu=A100", "take fp8=off"),
    (12, f"{V3} model.ffn_hidden_size=18440", "fp8.exclude_modules=[mlp.linear_fc1,mlp.linear_fc2]"),
    (13, f"{V3} check.gpu_memory_gb=40", "performance.recompute_modules"),
    (14, f"{V3_RL}", "rollout.sglang.server.tensor_parallel"),
    (15, f"{RL} rollout=sglang rollout.placement=colocated check.gpu=H100", "memory_saver=false"),
    (15, f"{RL} rollout=sglang check.gpu=H100 check.ranks=8", "check.nodes=2, with submit nodes=2 engine_nodes=1"),
    (15, f"{RL} rollout=sglang check.gpu=H100 check.ranks=8 check.nodes=2 rollout.sglang.server.tensor_parallel=16",
     "a server does not span nodes"),
    (15, "sample sample init.from=hf:{model} rollout=sglang check.gpu=H100 rollout.sglang.servers=9", "at most 8"),
    (16, f"{V3} check.host_memory_gb=10", "train.async_save=false"),
    (17, f"{V3} root={{full}}", "train.save_total_limit"),
    (17, "pretrain pretrain root={tight}", "train.save_total_limit"),
    (17, "pretrain pretrain root={tight} train.save_interval=10 train.keep_every=10", "train.keep_every"),
    (17, "pretrain pretrain train.keep_best=train/los", "train/loss"),
    (18, "grpo r1_zero init.from=hf:{bare}", "1 of 1 files are missing, model.safetensors first"),
    (18, "grpo r1_zero init.from=nowhere", "must be a run with a checkpoint"),
    (18, f"{RL} name=other root={{model}}/..", "another configuration"),
    (19, "sft sft init.from=hf:{many_ids}", "largest id"),
    (20, f"{RL} rollout.chat_template={{model}}/broken.jinja", "broken.jinja"),
    (21, f"{RL} data.prompts.path=nowhere.jsonl", "nowhere.jsonl"),
    (21, f"{RL} data.prompts.path={{model}}/long.jsonl", "tokens"),
    (22, f"{RL} rollout.max_response_tokens=512", "must be below model.max_sequence_length=512"),
    (23, f"{RL} rl.prompts_per_rollout=3 rl.group_size=3 rl.updates_per_rollout=2", "must divide the 9 samples"),
    (23, f"{RL} rl.updates_per_rollout=128 check.ranks=128", "fewer rl.updates_per_rollout"),
    (24, f"{RL} reward=custom reward.custom_function={{model}}/my.py:score", "it has rate"),
    (24, f"{RL} reward.helpfulness=1 reward.helpfulness_model=nowhere", "must be a run with a checkpoint"),
    (25, "pretrain pretrain check.time_limit_minutes=10 check.step_seconds=60", "take train.save_interval=2"),
    (25, "pretrain pretrain check.partition=b check.time_limit_minutes=90", "take at most 60"),
    (25, "pretrain pretrain check.partition=c", "take one of a, b"),
    (25, "pretrain pretrain check.nodes=600", "take fewer ranks, or another partition"),
    (26, f"{RL} rollout.weight_sync.include_mtp=true", "no multi-token layers"),
    (27, f"{RL} rollout=sglang rl.routing_replay=true", "must be false: the model has no routers"),
    (28, f"{V3} performance.moe_token_dispatcher_type=deepep check.network=ethernet", "take alltoall"),
    (28, "pretrain pretrain platform=cpu performance.moe_token_dispatcher_type=deepep", "allgather on a CPU"),
    (29, f"{RL} root={{narrow}} train.save_interval=100 train.steps=1000", "rollout.max_staleness"),
    (29, f"{RL} root={{full}} train.save_interval=100000 train.steps=100000", "rollout.max_staleness"),
]  # fmt: skip
"""Number of a check, a job that it refuses, and a part of what the table says."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What broken jobs name: a model, one whose tokenizer has ids beyond its embedding, and a disk that is full."""
    root = tmp_path_factory.mktemp("check")
    model = write_folder_of("qwen3", root / "model")
    many = write_folder_of("qwen3", root / "many", vocab_size=300)
    (model / "long.jsonl").write_text(json.dumps({"question": "1 + " * 1000, "answer": "1"}))
    (model / "broken.jinja").write_text("{% for message in messages %}{{ message['content'] }}")
    (model / "my.py").write_text("def rate(prompts, responses, answers, tasks):\n    raise SystemExit\n")
    (root / "other").mkdir()
    (root / "other" / "config.yaml").write_text("seed: 7\n")
    (root / "bare").mkdir()
    (root / "bare" / "config.json").write_text((model / "config.json").read_text())
    for name in FREE:
        (root / name).mkdir()
    return {"model": model, "many_ids": many, "bare": root / "bare", **{name: root / name for name in FREE}}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks are large but for those in FREE, and SLURM has two partitions: neither can be had here.

    `tests/slurm/test_recipes.py` reads the partitions of a real one.
    """
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(free_bytes(path)))
    limits = [Partition("a", None, 512, 8), Partition("b", 60.0, 512, 8)]
    monkeypatch.setattr(slurm, "partitions", lambda: limits)


class Usage(NamedTuple):
    free: float


def free_bytes(path: Path) -> float:
    return next((free for name, free in FREE.items() if f"/{name}" in str(path)), 1e17)


def checked(line: str, folders: dict[str, Path] | None = None) -> Report:
    verb, recipe, *overrides = line.format(**folders or {}).split()
    return check_command(JobCommand(verb, recipe, tuple(overrides)))


def said(report: Report, number: int) -> str:
    return " ".join(f"{found.text} {found.change}" for found in report.findings[number])


@pytest.mark.parametrize(("number", "line", "mend"), BROKEN)
def test_a_broken_job_is_refused_by_its_check_with_the_change_that_mends_it(
    number: int, line: str, mend: str, folders: dict[str, Path]
) -> None:
    start = time.process_time()
    report = checked(line, folders)
    assert time.process_time() - start < DEADLINE_S
    assert report.state(number) is State.REFUSED and mend in said(report, number)
    assert number in report.refused


def test_every_check_has_a_broken_job() -> None:
    assert {number for number, *_ in BROKEN} == {*range(1, NUM_CHECKS + 1)}
    assert [check.number for check in CHECKS] == [*range(1, NUM_CHECKS + 1)]


def test_a_broken_configuration_leaves_other_checks_unknown() -> None:
    report = checked("pretrain pretrain train.stepz=3")
    assert report.refused == [1]
    assert all(report.state(check.number) is State.UNKNOWN for check in CHECKS if check.number != 1)


@pytest.mark.parametrize("verb", [verb for verb, entry in VERBS.items() if not (entry.needs_model or entry.of_command)])
def test_the_recipe_of_every_verb_passes(verb: str) -> None:
    assert check_command(JobCommand(verb, VERBS[verb].recipe, ())).refused == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_of_a_shipped_recipe_passes_but_for_files_that_the_user_brings(recipe: str) -> None:
    report = checked(f"pipeline {recipe} root=nowhere {RECIPES[recipe]}")
    assert {*report.refused} <= {18, 19, 21}, [report.findings[number] for number in report.refused]


def test_a_recipe_is_checked_with_the_ranks_and_nodes_that_the_command_names() -> None:
    bf16 = "pipeline quickstart pipeline.overrides=['model.dtype=bf16'] check.gpu=H100 check.gpus_per_node=2"
    assert checked(f"{bf16} check.ranks=4 until=r1_zero").refused == [], "servers have a node beside two of the trainer"
    report = checked(f"{bf16} check.ranks=4 check.nodes=1 until=r1_zero")
    assert {2, 15} <= {*report.refused} and "take check.nodes=2" in said(report, 2)


def test_every_shipped_recipe_is_one_that_is_checked() -> None:
    """Of a verb, of a stage of a recipe with stages, or of a layout's job."""
    stages = {stage.config for name in RECIPES for stage in load("pipeline", [], name).pipeline.stages.values()}
    of_layouts = {job.command.recipe for path in layout_files() for job in layout_jobs(path)}
    checked_ones = {*RECIPES, *stages, *of_layouts, *(entry.recipe for entry in VERBS.values())}
    assert {*recipes()} - checked_ones == set()


@pytest.mark.parametrize(
    "machine",
    [
        "check.ranks=7",
        "check.ranks=8 check.nodes=2",
        "check.ranks=16 check.nodes=3",
        "check.ranks=1 check.gpus_per_node=1",
    ],
)
def test_servers_have_gpus_beside_the_trainer_or_on_other_nodes(machine: str, folders: dict[str, Path]) -> None:
    report = checked(f"{RL} rollout=sglang check.gpu=H100 {machine}", folders)
    assert report.state(15) in (State.PASSED, State.NOT_APPLICABLE), report.findings[15]


def test_a_run_that_goes_on_needs_space_for_what_it_lacks(folders: dict[str, Path]) -> None:
    line = "pretrain pretrain root={tight} name=begun"
    assert checked(line, folders).refused == [17]
    for step in (1, 2):
        (folders["tight"] / f"begun/checkpoints/step-{step:08d}").mkdir(parents=True)
    assert checked(line, folders).refused == [] and "1 checkpoints" in said(checked(line, folders), 17)


def test_the_change_that_a_width_asks_for_mends_it() -> None:
    line = f"{V3} model.ffn_hidden_size=18440"
    assert 12 in checked(line).refused
    assert 12 not in checked(f"{line} fp8.exclude_modules=[mlp.linear_fc1,mlp.linear_fc2]").refused


def test_memory_is_unknown_where_the_model_is() -> None:
    report = checked("sample sample init.from=nowhere rollout=sglang check.gpu=H100")
    assert report.state(14) is State.UNKNOWN and report.refused == [18]
    assert len(report.findings[18]) == 1, "an error is shown once"


def test_deepseek_v3_passes_on_its_own_layout() -> None:
    report = checked(V3)
    assert report.refused == []
    assert "14,800,027,385,856 tokens" in said(report, 10) and "128 data-parallel" in said(report, 2)


def test_a_refusal_can_be_made_a_warning() -> None:
    line = f"{V3} train.steps=3000"
    assert checked(line).refused and not checked(f"{line} check.warn_only=[9,10]").refused
