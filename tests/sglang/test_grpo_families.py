"""Reinforcement learning of models that other projects made, with a real server, and their way back to transformers."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.hf.config import hf_config
from megatron_r1.rollout.journal import Journal
from tests.support.chats import small_tokenizer
from tests.support.conversions import convert
from tests.support.jobs import Job, run_alone
from tests.support.samples import logprobs_of, prompt_of, row_of

SHAPE = ["model=tiny_dense", "model.num_layers=2", "model.vocab_size=516"]
KINDS = {
    "qwen": [*SHAPE, "model.tied_embeddings=true"],
    "qwen3moe": ["model=tiny_qwen3_moe", *SHAPE[1:]],
    "llama": [*SHAPE, "model.attention.qkv_bias=false", "model.tied_embeddings=false", "model.rope.base=5e5"],
}
GRPO = [
    "grpo", "platform=cpu", "threads=1", "track=off", "train.steps=2", "train.save_interval=1",
    "train.schedule.learning_rate=1e-3", "train.schedule.warmup_steps=1", "rl.prompts_per_rollout=4", "rl.group_size=4",
    "rl.updates_per_rollout=2", "rollout.max_response_tokens=24", "rollout.sglang.max_total_tokens=4096",
    "rollout.sglang.max_running_requests=16", "data.reasoning_gym_share=0.0",
]  # fmt: skip


REWARD = """
def score(prompts, responses, answers, tasks):
    return [sum(letter in "aeiou" for letter in response) / 10 for response in responses]
"""


@pytest.mark.sglang
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "kind", ["qwen", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3moe", "llama"))]
)
def test_what_is_exported_gives_the_servers_log_probabilities(kind, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path / "made"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(hf_config(load("grpo", KINDS[kind]).model)))
    torch.manual_seed(2)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
    assert type(theirs).__name__.lower().startswith(kind)
    theirs.save_pretrained(base)
    Tokenizer(small_tokenizer().backend, small_tokenizer().settings).save(base)
    (tmp_path / "vowels.py").write_text(REWARD)  # a random model is right about nothing else
    job = Job([*GRPO, *KINDS[kind], f"reward={tmp_path}/vowels.py:score", f"init.from='hf:{base}'"], tmp_path, "learnt")
    assert (done := run_alone(job)).returncode == 0, done.stderr
    assert [row["step"] for row in job.rows] == [1, 2] and all(
        row["mismatch/logprob_max_abs"] < 1e-4 for row in job.rows
    )
    # The second rollout was sampled by the weights of the first checkpoint.
    folder = convert(job.folder / "checkpoints/step-00000001", tmp_path / "exported", to="hf", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, after = largest_gap(theirs.eval(), job), largest_gap(model, job)
    print(f"{kind}: {after:.1e} from the export, {before:.1e} from what it started from")
    assert after < 1e-4 < 1e-3 < before


@torch.no_grad()
def largest_gap(model, job: Job) -> float:
    """Of transformers' log-probabilities from those of the second rollout."""
    largest = 0.0
    for sample in Journal(job.folder / "rollouts").read(2):
        tokens = row_of(sample)
        log_probs_LV = model(tokens).logits[0].log_softmax(-1)[len(prompt_of(sample)) - 1 : -1]
        found = log_probs_LV.gather(1, tokens[0, len(prompt_of(sample)) :, None])[:, 0]
        largest = max(largest, float((found - logprobs_of(sample)).abs().max()))
    return largest
