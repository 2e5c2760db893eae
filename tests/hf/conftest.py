"""Small DeepSeek-V3 shapes, and transformers' model of each as the independent party."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig, MtpConfig, RopeConfig
from megatron_r1.hf.config import hf_config
from tests.support.whole_models import native_shapes


def small_model(**changes: object) -> ModelConfig:
    """A model whose dimensions are all different, so that a swapped pair of them shows."""
    attention = AttentionConfig(q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14)
    moe = MoeConfig(num_experts=8, top_k=4, ffn_hidden_size=20, num_groups=4, group_top_k=2, first_dense_layers=1)
    settings = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 3, "ffn_hidden_size": 44, "vocab_size": 67}
    return ModelConfig(**{**settings, "max_sequence_length": 64, "attention": attention, "moe": moe, **changes})


SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "one-dense": small_model,
    "no-dense-no-query-rank": lambda: small_model(
        attention=AttentionConfig(q_lora_rank=0, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10),
        moe=MoeConfig(num_experts=6, top_k=2, ffn_hidden_size=12, num_groups=3, group_top_k=1, first_dense_layers=0),
    ),
    "two-dense-two-shared-yarn": lambda: small_model(
        num_layers=4,
        moe=MoeConfig(
            num_experts=4,
            top_k=2,
            ffn_hidden_size=12,
            num_groups=1,
            group_top_k=1,
            first_dense_layers=2,
            num_shared_experts=2,
        ),
        rope=RopeConfig(base=5000.0, factor=4.0, original_max_position=16),
        mtp=MtpConfig(num_layers=2),
    ),
}


@pytest.fixture(params=SHAPES, scope="session")
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return SHAPES[request.param]()


@pytest.fixture(scope="session")
def one_model() -> ModelConfig:
    return small_model()


@pytest.fixture(scope="session")
def random_tensors() -> Callable[[ModelConfig], dict[str, torch.Tensor]]:
    return _random_tensors


@pytest.fixture(scope="session")
def oracle(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """transformers' own model of that shape with random weights, and a balancing bias that matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("oracle")
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    torch.manual_seed(2)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.normal_(0, 0.2).add_(1.0 if "norm" in name else 0.0)
        for name, buffer in oracle.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return oracle


@pytest.fixture(scope="session")
def oracle_folder(oracle: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as transformers itself writes it."""
    folder = tmp_path_factory.mktemp("written-by-transformers")
    oracle.save_pretrained(folder)
    return folder


def _random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Native tensors of every name, as views of one flat buffer, which is how a distributed optimizer keeps them."""
    generator = torch.Generator().manual_seed(1)
    shapes = native_shapes(model)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = torch.randn(sum(sizes), generator=generator) * 0.2
    views = zip(shapes.items(), flat.split(sizes), strict=True)
    return {name: part.view(shape) for (name, shape), part in views}
