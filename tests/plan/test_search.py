"""Searches for layouts: legal, best first, with reasons; and the way from a plan to `submit`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.config.command_line import with_files
from megatron_r1.config.cross_checks import check_layout, check_sections
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError
from megatron_r1.memory.parts import GB
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.layouts import Fixed, layouts
from megatron_r1.plan.search import SIMULATED, Found, search, smallest_cluster, why_slower, why_too_large

MOONLIGHT = ["model=moonlight_16b", "train.sequence_length=4096", "train.micro_batch_size=1",
             "train.global_batch_size=1024"]  # fmt: skip


@pytest.fixture(scope="module")
def moonlight():  # type: ignore[no-untyped-def]
    config = load("pretrain", [*MOONLIGHT, "plan.gpu=h100"])
    return config, search(config, "pretrain", 16, Constants(), Fixed())


def test_every_layout_is_legal_fits_and_is_no_faster_than_the_one_before(moonlight) -> None:  # type: ignore[no-untyped-def]
    _, found = moonlight
    assert len(found.best_first) > 10
    for one in found.best_first:
        check_sections(one.job.config, "pretrain")
        check_layout(one.job.config, "pretrain", 16)
        assert one.memory.total <= 0.93 * 85 * GB
    seconds = [one.seconds for one in found.best_first[:SIMULATED]]
    assert seconds == sorted(seconds) and found.ties()[0] is found.best_first[0]
    # The card's own layout is TP1 PP1 EP8 (Megatron-Bridge, moonlight-16b-a3b).
    assert "TP1 PP1 EP8 DP16" in [one.layout for one in found.best_first[:3]]


def test_what_loses_has_a_reason(moonlight) -> None:  # type: ignore[no-untyped-def]
    _, found = moonlight
    best, slowest = found.best_first[0], found.best_first[-1]
    assert why_slower(slowest, best).startswith(f"{slowest.seconds / best.seconds - 1:+.1%}: ")
    large = load("pretrain", ["model=v3_671b", "train.sequence_length=4096", "train.global_batch_size=512",
                              "train.micro_batch_size=1", "plan.gpu=h100"])  # fmt: skip
    nothing = search(large, "pretrain", 64, Constants(), Fixed())
    assert not nothing.best_first and nothing.too_large
    assert "GB where 79 are: " in why_too_large(nothing.too_large[0], 0.93 * 85 * GB)


def test_a_key_that_the_command_sets_is_kept() -> None:
    config = load("pretrain", [*MOONLIGHT, "parallel.tensor=2", "performance.recompute_modules=[moe_act]"])
    fixed = Fixed(frozenset({"parallel.tensor", "performance.recompute_modules"}))
    for one in search(config, "pretrain", 16, Constants(), fixed).best_first:
        assert one.job.config.parallel.tensor == 2
        assert one.job.config.performance.recompute_modules == ["moe_act"]


def test_uneven_routing_takes_memory() -> None:
    layout = {"parallel.tensor": 1, "parallel.pipeline": 1, "parallel.expert": 8, "performance.recompute_modules": "[]"}
    fixed = Fixed(frozenset({*layout, "train.micro_batch_size"}))

    def activations(imbalance: float) -> float:
        keys = [f"{key}={value}" for key, value in layout.items()]
        config = load("pretrain", [*MOONLIGHT, *keys, f"plan.imbalance={imbalance}"])
        (found,) = search(config, "pretrain", 16, Constants(), fixed).best_first
        return found.memory.of("activations")

    assert 1.2 * activations(1.0) < activations(2.0) < 2 * activations(1.0)


def test_engines_that_share_gpus_leave_the_trainer_fewer_layouts() -> None:
    def found(placement: str) -> Found:
        server = ["rollout=sglang", "rollout.sglang.server.memory_saver=true", f"rollout.placement={placement}"]
        return search(load("grpo", ["model=moonlight_16b", *server]), "grpo", 16, Constants(), Fixed())

    separate, colocated = found("separate"), found("colocated")
    assert {one.layout for one in colocated.best_first} < {one.layout for one in separate.best_first}
    assert "engine's process" in colocated.best_first[0].memory.parts


def test_a_node_with_too_little_host_memory_is_too_small() -> None:
    away = ["train.ema_decay=0.999", "train.async_save=true", "train.optimizer.offload=true"]
    config = load("pretrain", ["model=v3_671b", "train.sequence_length=4096", "train.global_batch_size=512", *away,
                               "parallel.tensor=1", "parallel.pipeline=8", "plan.gpu=gb300"])  # fmt: skip
    fixed = Fixed(frozenset({"parallel.tensor", "parallel.pipeline"}))
    found = search(config, "pretrain", 64, Constants(), fixed)
    assert not found.best_first and found.too_large
    assert "of host memory where 960 are: " in why_too_large(found.too_large[0], 1.0)


def test_ranks_share_an_expert_where_more_cannot_share_the_experts() -> None:
    config = load("pretrain", ["model=tiny", "train.global_batch_size=64"])
    tried = {(one.parallel.expert, one.parallel.expert_tensor, one.parallel.tensor)
             for one in layouts(config, "pretrain", GPUS["H100"], 64, Fixed())}  # fmt: skip
    experts = config.model.moe.num_experts
    assert (experts, 2, 2) in tried and (experts // 2, 1, 2) in tried
    assert all(expert == experts and shared <= tensor for expert, shared, tensor in tried if shared > 1)
    given = replace(config, parallel=replace(config.parallel, expert=2))
    fixed = Fixed(frozenset({"parallel.expert"}))
    assert any(one.parallel.expert_tensor > 1 for one in layouts(given, "pretrain", GPUS["H100"], 64, fixed))


def test_the_smallest_cluster_is_the_first_that_fits() -> None:
    config = load("pretrain", [*MOONLIGHT, "plan.gpu=h100"])
    found = smallest_cluster(config, "pretrain", Constants(), Fixed())
    assert found.gpus in (8, 16) and found.best_first
    if found.gpus == 16:
        assert not search(config, "pretrain", 8, Constants(), Fixed()).best_first


def test_a_plan_goes_through_submit_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*MOONLIGHT, "gpu=h100", "gpus=16", f"root={tmp_path}", "name=moonlight", "plan.tokens=1e12",
               "plan.gpu_hour_price=2", "check.warn_only=[17]"]  # fmt: skip
    assert exit_code(["plan", "pretrain", *command]) == 0
    folder = tmp_path / "moonlight" / "plan"
    plan = orjson.loads((folder / "plan.json").read_bytes())
    assert plan["nodes"] == 2 and plan["cost"]["money"] == pytest.approx(2 * plan["cost"]["gpu_hours"])
    assert plan["layouts"][0]["layout"] in (folder / "plan.html").read_text()
    tokens = plan["layouts"][0]["tokens_per_second_per_gpu"]
    assert plan["cost"]["gpu_hours"] == pytest.approx(1e12 / tokens / 3600 / (1 - plan["cost"]["lost_share"]))
    capsys.readouterr()  # check 17 looks at the disk of this machine, not of the cluster
    assert exit_code(["submit", f"@{folder / 'submit.args'}", "dry_run=true"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in script
    for line in plan["layouts"][0]["overrides"]:
        assert line.partition("=")[0] in script


def test_a_plan_of_a_verb_without_training_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["plan", "evaluate"]) == 2
    assert "plan takes the command of one of pretrain" in capsys.readouterr().err


def test_a_number_of_gpus_that_no_layout_has_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert exit_code(["plan", "pretrain", "gpu=h100", "gpus=7", f"root={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("megatron-r1: plan.gpus=7: no layout fits: ")


def test_arguments_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "some.args").write_text("pretrain\n\n# a comment\nmodel=tiny\n")
    assert with_files(["submit", f"@{tmp_path}/some.args", "nodes=2"]) == [
        "submit",
        "pretrain",
        "model=tiny",
        "nodes=2",
    ]
    with pytest.raises(ConfigError, match="must be a text file"):
        with_files([f"@{tmp_path}/none"])
