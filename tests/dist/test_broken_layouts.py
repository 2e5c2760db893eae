"""Layouts that cannot be: each refused in one line, by one rank, before any rank looks for the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from megatron_r1 import __main__
from megatron_r1.__main__ import exit_code
from tests.support.launching import marked_processes

BROKEN = [
    # What the model cannot be divided by.
    ("pretrain", 8, "parallel.tensor=8", "must divide model.num_attention_heads=4"),
    ("pretrain", 2, "parallel.tensor=2 model.ffn_hidden_size=255", "must divide model.ffn_hidden_size=255"),
    ("pretrain", 2, "parallel.tensor=2 model.vocab_size=513", "must divide model.vocab_size=513"),
    ("pretrain", 2, "parallel.tensor=2 train.sequence_length=63", "must divide train.sequence_length=63"),
    (
        "pretrain",
        2,
        "parallel.tensor=2 model.moe.ffn_hidden_size=63",
        "must divide model.moe.num_shared_experts x ffn_hidden_size=63",
    ),
    ("pretrain", 6, "parallel.pipeline=6", "must leave every stage but the last a layer of model.num_layers=4"),
    ("grpo", 8, "parallel.pipeline=8", "must leave every stage but the last a layer of model.num_layers=4"),
    ("pretrain", 3, "parallel.expert=3", "must divide model.moe.num_experts=8"),
    (
        "pretrain",
        2,
        "parallel.expert=2 model.moe.num_experts=1 model.moe.top_k=1 model.moe.num_groups=1",
        "must divide model.moe.num_experts=1",
    ),
    (
        "pretrain",
        2,
        "parallel.expert_tensor=2 model.moe.ffn_hidden_size=65",
        "must divide model.moe.ffn_hidden_size=65",
    ),
    ("pretrain", 2, "parallel.pipeline=2 parallel.virtual_pipeline=4", "must leave every stage but the last a layer"),
    ("pretrain", 2, "parallel.pipeline=2 parallel.pipeline_layers=[2,3]", "must sum up to model.num_layers=4"),
    ("pretrain", 2, "parallel.pipeline=2 parallel.pipeline_layers=[2,1,1]", "must be 2 numbers"),
    ("pretrain", 2, "parallel.pipeline=2 parallel.pipeline_layers=[0,4]", "at least 1 layer"),
    ("pretrain", 2, "parallel.virtual_pipeline=2", "must be 1 where pipeline=1"),
    # What the ranks cannot be divided into.
    ("pretrain", 2, "parallel.tensor=4", "must divide the 2 ranks that were started"),
    ("grpo", 3, "parallel.pipeline=2", "must divide the 3 ranks that were started"),
    ("pretrain", 2, "parallel.tensor=2 parallel.pipeline=2", "tensor x pipeline x context=4 must divide the 2 ranks"),
    ("pretrain", 2, "parallel.expert=4", "expert x expert_tensor x pipeline=4 must divide 2 ranks"),
    ("grpo", 2, "parallel.tensor=2 parallel.expert=2 parallel.expert_tensor=2", "=4 must divide 2 ranks"),
    # What a stage cannot do.
    ("grpo", 2, "parallel.context=2", "must be 1: only pretrain"),
    (
        "grpo",
        2,
        "parallel.expert=2 performance.moe_token_dispatcher_type=allgather",
        "needs equally many tokens on every rank",
    ),
    ("pretrain", 2, "parallel.context=2 train.sequence_length=62", "must divide train.sequence_length=62"),
    ("grpo", 2, "rollout=local parallel.tensor=2", "needs the whole model on every rank"),
    ("pretrain", 2, "train.global_batch_size=5 train.micro_batch_size=5", "a multiple of the 2 data-parallel ranks"),
    ("pretrain", 2, "train.global_batch_size=12 train.micro_batch_size=4", "must divide the 6 sequences of a rank"),
    (
        "pretrain",
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=2",
        "must make at least parallel.pipeline=2 passes of a rank's 16 sequences",
    ),
    (
        "pretrain",
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=2 train.micro_batch_size=2"
        " parallel.microbatch_group_size_per_vp_stage=7",
        "must leave none of the 8 passes of a rank's 16 sequences, or at least parallel.pipeline=2: 2 does",
    ),
    (
        "pretrain",
        2,
        "parallel.pipeline=2 parallel.microbatch_group_size_per_vp_stage=2",
        "must be 0, or at least pipeline=2 with virtual_pipeline above 1",
    ),
    # What is no layout of stages.
    ("pretrain", 2, "parallel.pipeline=2 parallel.pipeline_layout='Ett|tmt|L'", "must be one E, then t, then m"),
    ("pretrain", 2, "parallel.pipeline=2 parallel.pipeline_layout='Et*4|m|L'", "must have 2 stages"),
    ("pretrain", 4, "parallel.pipeline=4 parallel.pipeline_layout='Et*4|m|m|L'", "must have all m in one stage"),
    ("pretrain", 2, "parallel.pipeline=2 parallel.pipeline_layout='Et*3|tL'", "=4 t and model.mtp.num_layers=1 m"),
    (
        "pretrain",
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.pipeline_layout='Ett|tt|m|L'"
        " train.micro_batch_size=1",
        "must not have m on the first pipeline rank",
    ),
    (
        "pretrain",
        3,
        "parallel.pipeline=3 parallel.virtual_pipeline=2 parallel.pipeline_layout='Et|t|t|tm|L|L'",
        "must be one E",
    ),
    (
        "pretrain",
        2,
        "parallel.pipeline=2 parallel.pipeline_layout='Ett|ttmL' parallel.pipeline_layers=[2,2]",
        "must be empty where pipeline_layers is not",
    ),
    ("sft", 3, "parallel.pipeline=3 parallel.pipeline_layout='Ett|ttm|L'", "only pretrain divides them"),
    ("grpo", 2, "parallel.pipeline=2 parallel.virtual_pipeline=2", "must be 1: interleaved stages"),
    ("sft", 2, "train.global_batch_size=5 train.micro_batch_size=5", "a multiple of the 2 data-parallel ranks"),
    (
        "sft",
        2,
        "parallel.expert=2 sft.packing=none performance.moe_token_dispatcher_type=allgather",
        "needs equally many tokens on every rank: with sft.packing=none",
    ),
    # What is no degree.
    ("pretrain", 2, "parallel.tensor=0", "must be at least 1"),
    ("pretrain", 2, "parallel.expert=-2", "must be at least 1"),
]
DOWN_S = 10.0


def never(module: str) -> None:
    raise AssertionError(f"{module} must not be imported for a layout that is refused")


@pytest.mark.parametrize(("verb", "ranks", "overrides", "allowed"), BROKEN, ids=[row[2] for row in BROKEN])
def test_a_broken_layout_is_refused_in_one_line(verb, ranks, overrides, allowed, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "import_module", never)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    errors = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        assert exit_code([verb, *overrides.split()]) == 2
        errors.append(capsys.readouterr().err)
    assert re.fullmatch(r"megatron-r1: [a-z_.]+=(\S+|\[.*\]): .*\n", errors[0]) and allowed in errors[0]
    assert not any(errors[1:])


def test_no_layout_is_listed_twice():
    assert len({row[:3] for row in BROKEN}) == len(BROKEN)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("verb", "overrides", "allowed"),
    [
        ("pretrain", "parallel.tensor=4", "must divide the 2 ranks"),
        ("grpo", "init.from=absent", "must be a run with a checkpoint"),
        ("pretrain", "seed=7 data.num_documents=2000 model.num_layers=2", "seed: 0 -> 7"),
    ],
    ids=["before torch is imported", "by the stage", "by the first rank alone, while the other waits for it"],
)
def test_all_ranks_are_down_soon_after_the_refusal(verb, overrides, allowed, tmp_path):
    if "seed" in overrides:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("name: run\nroot: " + str(tmp_path) + "\nseed: 0\n")
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, "-m", "megatron_r1", verb, f"root='{tmp_path}'", "name=run", "platform=cpu", *overrides.split()],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MEGATRON_R1_TEST": str(tmp_path)},
    )
    try:
        lines, refused = [], 0.0
        assert process.stderr
        for line in process.stderr:
            lines.append(line)
            if line.startswith("megatron-r1: "):
                refused = time.monotonic()
        process.wait(60)
        seconds = time.monotonic() - refused
        refusals = [line for line in lines if line.startswith("megatron-r1: ")]
        assert len(refusals) == 1 and allowed in refusals[0], "".join(lines)
        assert any(re.search(r"exitcode\s*: 2\b", line) for line in lines) and process.returncode
        assert seconds < DOWN_S and not marked_processes(str(tmp_path))
        print(f"down {seconds:.1f} s after the refusal")
    finally:
        for left in marked_processes(str(tmp_path)):
            left.kill()
        process.wait()
