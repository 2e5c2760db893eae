"""Random tiny DeepSeek-V3 models that SGLang serves on the CPU, built with transformers."""

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

VOCABULARY = 160


def tiny_config() -> DeepseekV3Config:
    """Odd widths, so that no two tensors fit each other by accident; YaRN with factor 1 is plain rotary positions."""
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128,
    }  # fmt: skip
    return DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=40, kv_lora_rank=24, qk_nope_head_dim=20,
        qk_rope_head_dim=8, v_head_dim=12, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
        topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=1, norm_topk_prob=True, moe_layer_freq=1,
        topk_method="noaux_tc", scoring_func="sigmoid", num_nextn_predict_layers=0, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters=rope,
    )  # fmt: skip


def tiny_model(seed: int) -> DeepseekV3ForCausalLM:
    """A model in fp32 whose distributions are far from uniform, so that wrong weights show."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV3ForCausalLM(tiny_config()).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.05, generator=generator)
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[DeepseekV3ForCausalLM]]:
    """Eleven model folders (safetensors) and their models, of different weights."""
    built = [tiny_model(seed) for seed in range(11)]
    root = tmp_path_factory.mktemp("models")
    folders = [root / f"model-{seed}" for seed in range(11)]
    for folder, model in zip(folders, built, strict=True):
        model.save_pretrained(folder)
    return folders, built
