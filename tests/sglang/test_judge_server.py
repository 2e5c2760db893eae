"""The judge against a real SGLang server on the CPU: its grammar makes any model, even a random one, reply in JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_r1.config.data import DataConfig
from megatron_r1.config.reward import JudgeConfig
from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.rewards.judge import client
from megatron_r1.rewards.judge.reward import JudgeReward
from megatron_r1.rollout.sglang.cpu import plugin as cpu
from megatron_r1.rollout.sglang.servers.arguments import server_arguments
from megatron_r1.rollout.sglang.servers.process import Server

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class JudgedPrompt:
    id: str = "p"
    question: str = "What is 2 + 3?"
    answer: str = "5"
    task: str = "text"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = train_tokenizer(DataConfig(num_documents=300))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.float32).save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    config = SGLangConfig(max_running_requests=8, max_total_tokens=16384)
    arguments = server_arguments(
        folder / "model", config, device="cpu", dtype="float32", context_length=2040, version="0"
    )
    running = Server(arguments | {"skip_tokenizer_init": False}, cpu.environment(1), folder / "log")
    try:
        deadline = time.monotonic() + 500
        while not running.accepts():
            running.check()
            assert time.monotonic() < deadline, running.failure_line()
            time.sleep(0.5)
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("asks", ["comparison", "correctness"])
def test_a_random_model_gives_verdicts(server, asks, monkeypatch):
    monkeypatch.setenv(client.KEY, server.endpoint.api_key)
    settings = JudgeConfig(
        url=f"{server.url}/v1", mode=asks, votes=2, max_tokens=200, analysis_characters=10, attempts=10
    )
    reward = JudgeReward(settings)
    values = reward.score([JudgedPrompt(), JudgedPrompt()], ["5", "<think>hm</think> <answer>6</answer>"])
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in values), values
    counts = reward.judge.counts
    # What a random model writes may reach the length limit before it comes to a verdict; then it is asked again.
    assert 2 <= counts["verdicts"] <= 4 and counts["verdicts"] + counts["no_verdict"] == counts["calls"]
    assert not counts["failed"]
