"""Runs of reinforcement learning, with a critic and on questions of a file, and on pairs; gone on with bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.data.prompts.files import PromptFile
from megatron_r1.data.prompts.prompts import FilePrompts, Prompt
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.model.names import in_multi_token_layer
from megatron_r1.rollout.journal import Journal
from megatron_r1.runs.prompts import pin_prompts
from megatron_r1.track.metrics import reproducible
from megatron_r1.track.record import read_metrics
from tests.support.fork_server import run_forked_to_the_end
from tests.support.recorded import unregistered
from tests.support.samples import prompt_of

pytestmark = pytest.mark.timeout(240)
SUPPORT = Path(__file__).parents[1] / "support"
POLICY = {"model", "exp_avg", "exp_avg_sq", "reference"}
CRITIC = {"critic", "critic_exp_avg", "critic_exp_avg_sq", "critic_progress"}

QUESTIONS = [f"What is {n} + 1?" for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo-runs")
    rows = [
        *({"question": question, "answer": n + 1} for n, question in enumerate(QUESTIONS)),
        {"question": "<|eos|>", "answer": 0},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_forked_to_the_end(SUPPORT / "grpo_runs.py", folder, seconds=200)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    return [reproducible(row) for row in read_metrics(folder / run / "metrics.jsonl")]


def tensors(folder: Path, run: str, kind: str, step: int = 2) -> dict[str, torch.Tensor]:
    return dict(WholeTensors(folder / run / "checkpoints" / f"step-{step:08}", kind))


def test_a_stopped_run_resumes_bit_for_bit(folder, found):
    assert "SIGTERM: stopped after step 1" in found["stopped"]
    assert len(rows(folder, "whole")) == 2 and rows(folder, "stopped") == rows(folder, "whole")
    for kind in POLICY | CRITIC:
        one, other = (tensors(folder, run, kind) for run in ("whole", "stopped"))
        assert one and one.keys() == other.keys(), kind
        assert all(torch.equal(one[name], other[name]) for name in one), kind
    assert tensors(folder, "whole", "critic_progress")["updates"].tolist() == [4]


@pytest.mark.parametrize(
    ("run", "command"),
    [
        ("base", "pretrain"), ("speaker", "pretrain"), ("judge", "reward_model"), ("whole", "grpo"), ("asked", "grpo"),
        ("distilled", "grpo"), ("scenarios", "grpo"), ("preferring", "dpo"),
    ],
)  # fmt: skip
def test_the_registry_lists_what_each_command_records(folder, run, command):
    assert unregistered(read_metrics(folder / run / "metrics.jsonl"), command) == []


def test_a_critic_starts_from_the_policy_and_is_trained_separately(folder):
    base, critic, policy = (
        tensors(folder, run, kind, step)
        for run, kind, step in (("base", "model", 1), ("whole", "critic", 2), ("whole", "model", 2))
    )
    untouched = {name for name in base if torch.equal(base[name], critic[name])}
    assert critic.keys() - base.keys() == {"reward_head.weight", "reward_head.bias"}
    assert "output_layer.weight" in untouched and "embedding.word_embeddings.weight" not in untouched
    assert critic["reward_head.weight"].any() and not torch.equal(
        policy["output_layer.weight"], base["output_layer.weight"]
    )
    row = rows(folder, "whole")[-1]
    assert row["critic/loss"] > 0 and row["critic/gradient_norm"] > 0 and row["policy/kl_in_reward"] != 0


def test_a_critic_starts_from_a_reward_model(folder, found):
    judge, critic = tensors(folder, "judge", "model"), tensors(folder, "judged", "critic", 1)
    assert judge.keys() == critic.keys() and judge["reward_head.weight"].any()
    for name, tensor in judge.items():
        torch.testing.assert_close(critic[name], tensor, rtol=0, atol=1e-9)
    assert "rl.critic.init_from=" in found["no_reward_model"]
    assert "must be a run of the verb reward_model" in found["no_reward_model"]


def test_questions_of_a_file_are_prompts_in_the_models_own_template(folder):
    tokenizer = Tokenizer.load(folder / "base" / "checkpoints" / "step-00000001" / "tokenizer")
    listed = FilePrompts([Prompt(str(n + 1), text, str(n + 1), "", "file") for n, text in enumerate(QUESTIONS)], 0)
    samples = [sample for step in (1, 2) for sample in Journal(folder / "asked" / "rollouts").read(step)]
    assert [sample.prompt_id for sample in samples] == [listed.at(index // 2).id for index in range(16)]
    for sample in samples:
        expected = f"<|bos|><|user|>{QUESTIONS[int(sample.prompt_id) - 1]}<|assistant|>"
        assert prompt_of(sample) == tuple(tokenizer.encode(expected))
    assert (folder / "asked" / "bad_rows.txt").read_text() == (
        f"{folder}/questions.jsonl:6: the question holds the control token <|eos|>\n"
    )
    assert rows(folder, "asked")[-1]["train/skipped_updates"] == 0


def test_some_responses_are_in_a_table_where_wandb_shows_them(folder):
    (table,) = (folder / "asked" / "tables").iterdir()
    assert table.name == "step-00000002.jsonl"
    found = [json.loads(line) for line in table.read_text().splitlines()]
    samples = list(Journal(folder / "asked" / "rollouts").read(2))
    assert [row["prompt_id"] for row in found] == [sample.prompt_id for sample in samples]
    assert [row["reward"] for row in found] == [sample.reward for sample in samples]
    assert all(f"<|user|>{QUESTIONS[int(row['prompt_id']) - 1]}<|assistant|>" in row["prompt"] for row in found)
    assert not (folder / "whole" / "tables").exists(), "without wandb"


def test_a_policy_learns_from_a_teacher_without_rewards_or_groups(folder, found):
    first, second = rows(folder, "distilled")
    assert first["policy/kl_loss"] == first["policy/kl"] > 0 and first["rollout/reward"] == 0
    assert first["train/gradient_norm"] > 0 and second["train/skipped_updates"] == 0
    samples = Journal(folder / "distilled" / "rollouts").read(1)
    assert len({sample.group for sample in samples}) == len(samples) == 8
    assert not tensors(folder, "distilled", "reference"), "a teacher is no part of a checkpoint"
    base, teacher, policy = (
        tensors(folder, *of) for of in (("base", "model", 1), ("whole", "model"), ("distilled", "model"))
    )
    assert base.keys() == teacher.keys() == policy.keys()
    assert any(not torch.equal(base[name], policy[name]) for name in base)
    assert "rl.teacher.from=" in found["other_vocabulary"] and "the student's vocabulary" in found["other_vocabulary"]


def test_rules_score_reasoning_and_a_model_the_general_prompts_of_the_last_step(folder):
    first, last = rows(folder, "scenarios")
    assert "rollout/reward/helpfulness" not in first and last["rollout/reward/helpfulness"] != 0
    parts = {
        step: [sample.reward_parts for sample in Journal(folder / "scenarios" / "rollouts").read(step)]
        for step in (1, 2)
    }
    assert {*map(frozenset, parts[1])} == {frozenset({"accuracy", "format"})}
    general = [one for one in parts[2] if "accuracy" not in one]
    assert 0 < len(general) < len(parts[2]) == 16 and any(set(one) == {"format", "helpfulness"} for one in general)
    base, policy = (tensors(folder, run, "model") for run in ("speaker", "scenarios"))
    routers = [name for name in policy if name.endswith("router.weight")]
    assert routers and all(torch.equal(base[name], policy[name]) for name in routers), "routing=frozen"
    assert not any("router" in name for name in tensors(folder, "scenarios", "exp_avg"))
    assert not torch.equal(base["output_layer.weight"], policy["output_layer.weight"])


def test_a_policy_trains_on_pairs_and_is_evaluated_on_validation_pairs(folder):
    recorded = rows(folder, "preferring")
    assert [row["step"] for row in recorded] == [1, 2, 3, 4, 5, 6], "3 epochs of 16 pairs in batches of 8"
    assert recorded[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6) and recorded[0]["train/margin"] == 0.0
    assert recorded[-1]["train/loss"] < 0.65 and recorded[-1]["train/accuracy"] > 0.5
    assert [row["step"] for row in recorded if "eval/margin" in row] == [4, 6]
    results = json.loads((folder / "preferring" / "accuracy.json").read_text())
    assert results["items"] == 6 and results["accuracy"]["mean"] == recorded[-1]["eval/accuracy"]
    base, reference, policy = (
        tensors(folder, run, kind, step)
        for run, kind, step in (("speaker", "model", 2), ("preferring", "reference", 6), ("preferring", "model", 6))
    )
    assert base.keys() == reference.keys() and all(torch.equal(base[name], reference[name]) for name in base)
    changed = {name for name in base if not torch.equal(base[name], policy[name])}
    assert "output_layer.weight" in changed
    assert any(in_multi_token_layer(name) for name in base) and not any(map(in_multi_token_layer, changed))
    assert not any(name.endswith("expert_bias") for name in changed)


def test_a_stopped_run_on_pairs_resumes_bit_for_bit(folder, found):
    """Its checkpoint is all that it reads: the weights that it first started from are damaged meanwhile."""
    assert "SIGTERM: stopped after step 3" in found["stopped_dpo"]
    assert rows(folder, "stopped_dpo") == rows(folder, "preferring")
    for kind in POLICY:
        one, other = (tensors(folder, run, kind, 6) for run in ("preferring", "stopped_dpo"))
        assert one and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), kind


def test_a_resumed_run_has_the_same_questions(tmp_path):
    prompts = [Prompt("1", "1?", "1", "", "file"), Prompt("2", "2?", "2", "", "file")]
    pin_prompts([PromptFile(prompts, [])], tmp_path)
    pin_prompts([PromptFile([*prompts], ["a: bad"])], tmp_path)
    assert (tmp_path / "bad_rows.txt").read_text() == "a: bad\n"
    for others in (prompts[::-1], prompts[:1], [replace(prompts[0], answer="3"), prompts[1]]):
        with pytest.raises(DataError, match="prompt file changed"):
            pin_prompts([PromptFile(others, [])], tmp_path)
    pin_prompts([], tmp_path)


def test_general_tasks_are_measured_by_their_own_rules(folder):
    results = json.loads((folder / "general" / "results.json").read_text())
    measured = results["models"]["model"]["sampled"]
    # A base of one step answers nothing as it was asked, and goes about nothing harmful.
    assert {name: share["mean"] for name, share in measured.items()} == {"helpful": 0.0, "safe": 1.0, "format": 0.0}
    rows = [json.loads(line) for line in (folder / "general" / "samples" / "model.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * (1 + 2) and len({row["question"] for row in rows}) == 6
