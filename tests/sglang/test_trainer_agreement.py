"""SGLang's log-probabilities against the trainer's own, through the way that weights take in training."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.rollout import RolloutConfig, SGLangConfig
from megatron_r1.model.build import native_tensors, without_multi_token_prediction
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.factory import sglang_engine
from tests.support.agreement import disagreement
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of


def gap_of(model, engine, version: str) -> float:
    """How far the engine's log-probs of 8 responses of its own are from the model's."""
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(5, 512, (n,), generator=generator).tolist()) for n in (4, 9, 17, 30)]
    requests = [Request(str(i), prompts[i // 2]) for i in range(8)]
    completions = engine.generate(requests, Sampling(1.0, 1.0, 20, (), 0))
    gaps = []
    for completion in completions:
        assert completion.weight_version == version
        tokens = row_of(completion)
        with torch.no_grad(), without_multi_token_prediction(model):
            log_probs_LV = model(tokens, torch.arange(tokens.shape[1])[None], None)[0].log_softmax(-1)
        chosen = torch.tensor(tokens_of(completion))
        expected = log_probs_LV[len(prompt_of(completion)) - 1 : -1].gather(-1, chosen[:, None])[:, 0]
        gaps.append(float((expected - logprobs_of(completion)).abs().max()))
    return disagreement(gaps)


def test_log_probs_agree_before_and_after_ten_updates(new_model, tmp_path):
    from megatron_r1.config.data import DataConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer

    train_tokenizer(DataConfig(num_documents=2000)).save(tmp_path / "tokenizer")
    shape = ModelConfig(init_std=0.08)
    model = new_model(shape)
    model.eval()
    rollout = RolloutConfig(sglang=SGLangConfig(max_running_requests=16, max_total_tokens=4096))
    noise = torch.Generator().manual_seed(0)
    gaps = []
    with sglang_engine(
        rollout, shape, lambda: native_tensors(model), tmp_path / "tokenizer", tmp_path / "logs", "cpu"
    ) as (engine, sync):
        sync.push("0")
        gaps.append(gap_of(model, engine, "0"))
        for version in range(1, 11):
            with torch.no_grad():
                for name, tensor in native_tensors(model):
                    scale = 0.05 if name.endswith("expert_bias") else 0.02
                    tensor.add_(torch.randn(tensor.shape, generator=noise) * scale)
            sync.push(str(version))
            gaps.append(gap_of(model, engine, str(version)))
    print("largest log-prob difference per version:", [f"{gap:.1e}" for gap in gaps])
    assert max(gaps) < 1e-4


GROUPED = ("model=tiny_dense", "model.attention.qkv_bias=false")
LLAMA3 = ("rope.scaling=llama3", "rope.factor=8", "rope.original_max_position=32", "rope.beta_fast=4")
FAMILIES = {
    "qwen2": ("model=tiny_dense",),
    "qwen3": (*GROUPED, "model.attention.qk_norm=true"),
    "qwen3-moe": ("model=tiny_qwen3_moe",),
    "llama": (*GROUPED, "model.tied_embeddings=false", *(f"model.{change}" for change in LLAMA3)),
    "deepseek-v2": ("model.moe.score_function=softmax", "model.moe.num_groups=4", "model.mtp.num_layers=0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_every_family_agree(new_model, tmp_path, family):
    from megatron_r1.config.data import DataConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer

    train_tokenizer(DataConfig(num_documents=2000)).save(tmp_path / "tokenizer")
    shape = load("pretrain", ["model.init_std=0.08", *FAMILIES[family]]).model
    model = new_model(shape).eval()
    rollout = RolloutConfig(sglang=SGLangConfig(max_running_requests=16, max_total_tokens=4096))
    noise = torch.Generator().manual_seed(0)
    with sglang_engine(
        rollout, shape, lambda: native_tensors(model), tmp_path / "tokenizer", tmp_path / "logs", "cpu"
    ) as (engine, sync):
        for version in ("0", "1"):
            sync.push(version)
            gap = gap_of(model, engine, version)
            print(f"{family}: largest log-prob difference of version {version} {gap:.1e}")
            assert gap < 1e-4
            for _, tensor in native_tensors(model):
                tensor.add_(torch.randn(tensor.shape, generator=noise) * 0.02)
