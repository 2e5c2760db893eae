"""The recipe r1_671b against the numbers of the DeepSeek reports, line by line.

V3 is the DeepSeek-V3 report (version 1), R1 the DeepSeek-R1 report (arXiv version 2, which has the Nature article's
supplement as appendices); "derived" is arithmetic on their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.stage_checks import check_stages
from megatron_r1.pipeline.compose import ComposedStage, compose_stages

PAPERS = [
    # DeepSeek-V3-Base
    ("pretrain", "model.num_layers", 61, "V3 4.2"),
    ("pretrain", "model.hidden_size", 7168, "V3 4.2"),
    ("pretrain", "model.num_attention_heads", 128, "V3 4.2"),
    ("pretrain", "model.attention.kv_lora_rank", 512, "V3 4.2"),
    ("pretrain", "model.attention.q_lora_rank", 1536, "V3 4.2"),
    ("pretrain", "model.attention.qk_nope_head_dim", 128, "V3 4.2"),
    ("pretrain", "model.attention.qk_rope_head_dim", 64, "V3 4.2"),
    ("pretrain", "model.moe.first_dense_layers", 3, "V3 4.2"),
    ("pretrain", "model.moe.num_experts", 256, "V3 4.2"),
    ("pretrain", "model.moe.num_shared_experts", 1, "V3 4.2"),
    ("pretrain", "model.moe.top_k", 8, "V3 4.2"),
    ("pretrain", "model.moe.ffn_hidden_size", 2048, "V3 4.2"),
    ("pretrain", "model.moe.num_groups", 8, "config.json of the release, n_group"),
    ("pretrain", "model.moe.group_top_k", 4, "V3 4.2, at most 4 nodes"),
    ("pretrain", "model.moe.scaling_factor", 2.5, "config.json of the release"),
    ("pretrain", "model.moe.bias_update_rate", 0.001, "V3 4.2"),
    ("pretrain", "model.moe.sequence_loss_coefficient", 1e-4, "V3 4.2"),
    ("pretrain", "model.mtp.num_layers", 1, "V3 4.2"),
    ("pretrain", "model.init_std", 0.006, "V3 4.2"),
    ("pretrain", "train.optimizer.beta1", 0.9, "V3 4.2"),
    ("pretrain", "train.optimizer.beta2", 0.95, "V3 4.2"),
    ("pretrain", "train.optimizer.weight_decay", 0.1, "V3 4.2"),
    ("pretrain", "train.optimizer.max_grad_norm", 1.0, "V3 4.2"),
    ("pretrain", "train.sequence_length", 4096, "V3 4.2"),
    ("pretrain", "train.global_batch_size", 15360, "V3 4.2"),
    ("pretrain", "train.schedule.batch_ramp.start", 3072, "V3 4.2"),
    ("pretrain", "train.schedule.batch_ramp.tokens", 469_000_000_000, "V3 4.2"),
    ("pretrain", "train.schedule.learning_rate", 2.2e-4, "V3 4.2"),
    ("pretrain", "train.schedule.min_learning_rate", 7.3e-6, "V3 4.2"),
    ("pretrain", "train.schedule.warmup_steps", 2000, "V3 4.2"),
    ("pretrain", "fp8.enabled", True, "V3 3.3"),
    ("pretrain", "data.indexed.cross_document_attention", True, "V3 4.1"),
    ("pretrain", "parallel.pipeline", 16, "V3 3.2"),
    ("pretrain", "parallel.expert", 64, "V3 3.2"),
    ("pretrain", "parallel.tensor", 1, "V3 3.2"),
    ("context_32k", "model.rope.factor", 40.0, "V3 4.3"),
    ("context_32k", "model.rope.beta_slow", 1.0, "V3 4.3, alpha"),
    ("context_32k", "model.rope.beta_fast", 32.0, "V3 4.3, beta"),
    ("context_32k", "train.sequence_length", 32_768, "V3 4.3"),
    ("context_32k", "train.global_batch_size", 1920, "V3 4.3"),
    ("context_32k", "train.steps", 1000, "V3 4.3"),
    ("context_32k", "train.schedule.learning_rate", 7.3e-6, "V3 4.3"),
    ("base", "model.rope.factor", 40.0, "V3 4.3"),
    ("base", "train.sequence_length", 131_072, "V3 4.3"),
    ("base", "train.global_batch_size", 480, "V3 4.3"),
    ("base", "train.steps", 1000, "V3 4.3"),
    ("base", "train.schedule.learning_rate", 7.3e-6, "V3 4.3"),
    # DeepSeek-R1-Zero
    ("r1_zero_32k", "train.schedule.learning_rate", 3e-6, "R1 2.1"),
    ("r1_zero_32k", "rl.kl_coefficient", 0.001, "R1 2.1"),
    ("r1_zero_32k", "rollout.temperature", 1.0, "R1 2.1"),
    ("r1_zero_32k", "rl.group_size", 16, "R1 2.1"),
    ("r1_zero_32k", "rl.prompts_per_rollout", 512, "R1 2.1, derived: 8,192 outputs in groups of 16"),
    ("r1_zero_32k", "rl.updates_per_rollout", 16, "R1 2.1, mini-batches"),
    ("r1_zero_32k", "rl.epochs_per_rollout", 1, "R1 2.1"),
    ("r1_zero_32k", "rl.reference_sync_interval", 25, "R1 2.1, derived: 400 updates"),
    ("r1_zero_32k", "rollout.max_response_tokens", 32_768, "R1 2.1"),
    ("r1_zero_32k", "reward.accuracy", 1.0, "R1 2.2"),
    ("r1_zero_32k", "reward.format", 1.0, "R1 2.2, the same weight"),
    ("r1_zero_32k", "reward.language", 0.0, "R1 2.2"),
    ("r1_zero_32k", "rollout.chat_template", "r1_zero", "R1 table 1"),
    ("r1_zero", "rollout.max_response_tokens", 65_536, "R1 2.1"),
    ("r1_zero", "train.schedule.learning_rate", 3e-6, "R1 2.1"),
    # DeepSeek-V3
    ("v3_sft", "sft.epochs", 2, "V3 5.1"),
    ("v3_sft", "train.schedule.learning_rate", 5e-6, "V3 5.1"),
    ("v3_sft", "train.schedule.min_learning_rate", 1e-6, "V3 5.1"),
    ("v3_sft", "train.schedule.lr_decay_style", "cosine", "V3 5.1"),
    ("v3_sft", "sft.packing", "best_fit", "V3 5.1, packed with sample masking"),
    ("helpfulness", "reward_model.objective", "pairwise", "R1 3.1"),
    ("helpfulness", "reward_model.scored_part", "summary", "R1 3.1"),
    ("helpfulness", "train.global_batch_size", 256, "R1 3.1"),
    ("helpfulness", "train.schedule.learning_rate", 6e-6, "R1 3.1"),
    ("helpfulness", "reward_model.epochs", 1, "R1 3.1"),
    ("helpfulness", "train.sequence_length", 8192, "R1 3.1"),
    ("safety", "reward_model.objective", "pointwise", "R1 3.1"),
    ("safety", "reward_model.scored_part", "response", "R1 3.1"),
    ("safety", "train.global_batch_size", 256, "R1 3.1"),
    ("safety", "train.schedule.learning_rate", 6e-6, "R1 3.1"),
    ("safety", "reward_model.epochs", 1, "R1 3.1"),
    # DeepSeek-R1
    ("zero_samples", "rollout.temperature", 1.0, "R1 B.3.2"),
    ("cold_start_sft", "train.schedule.learning_rate", 5e-5, "R1 B.4.2"),
    ("cold_start_sft", "train.schedule.min_learning_rate", 5e-6, "R1 B.4.2"),
    ("cold_start_sft", "train.global_batch_size", 128, "R1 B.4.2"),
    ("cold_start_sft", "train.sequence_length", 32_768, "R1 B.4.2"),
    ("reasoning_rl", "rl.clip_epsilon", 10.0, "R1 3.2.1"),
    ("reasoning_rl", "reward.language", 1.0, "R1 3.2.1, added to the other rewards"),
    ("reasoning_rl", "rollout.max_response_tokens", 32_768, "R1 3.2.1"),
    ("reasoning_rl", "rollout.temperature", 1.0, "R1 3.2.1"),
    ("reasoning_rl", "train.schedule.learning_rate", 3e-6, "R1 3.2.1"),
    ("reasoning_rl", "rl.group_size", 16, "R1 3.2.1"),
    ("reasoning_rl", "rl.kl_coefficient", 0.001, "R1 3.2.1"),
    ("sft_2", "sft.epochs", 2, "R1 version 1, 2.3.3"),
    ("sft_2", "train.schedule.learning_rate", 5e-5, "R1 B.4.2"),
    ("sft_2", "train.schedule.min_learning_rate", 5e-6, "R1 B.4.2"),
    ("sft_2", "train.global_batch_size", 128, "R1 B.4.2"),
    ("sft_2", "train.sequence_length", 32_768, "R1 B.4.2"),
    ("r1", "rollout.temperature", 0.7, "R1 3.2.2"),
    ("r1", "reward.language", 1.0, "R1 3.2.2, equation 8"),
    ("r1", "reward.format", 1.0, "R1 3.2.2, equation 10"),
    ("r1", "rl.clip_epsilon", 10.0, "R1 3.2.2, as in the first stage"),
    ("r1", "data.mixture.general.from_step", -25, "R1 3.2.2, derived: general data in the final 400 updates"),
    ("r1", "reward.domains.accuracy", "reasoning", "R1 3.2.2, equation 9"),
    ("r1", "reward.domains.helpfulness", "helpfulness", "R1 3.2.2, each query has one set"),
    ("r1", "reward.domains.harmlessness", "harmlessness", "R1 3.2.2, each query has one set"),
    # Students
    *(
        (student, key, value, "R1 table 6")
        for student, rate in {
            "qwen_1_5b": 1e-4,
            "qwen_7b": 8e-5,
            "qwen_14b": 7e-5,
            "qwen_32b": 6e-5,
            "llama_8b": 5e-5,
            "llama_70b": 2e-5,
        }.items()
        for key, value in {
            "train.schedule.learning_rate": rate,
            "train.schedule.min_learning_rate": pytest.approx(rate / 10),
            "train.global_batch_size": 64,
            "train.sequence_length": 32_768,
            "sft.epochs": 2,
        }.items()
    ),
    # Evaluation
    ("evaluate_r1", "evaluate.temperature", 0.6, "R1 D.1"),
    ("evaluate_r1", "rollout.top_p", 0.95, "R1 D.1"),
    ("evaluate_r1", "rollout.max_response_tokens", 32_768, "R1 D.1"),
    ("evaluate_r1", "evaluate.samples_per_prompt", 64, "R1 D.1, AIME and GPQA"),
    ("hf", "convert.dtype", "fp8", "the release"),
]
STARTS_FROM = {
    "context_32k": ("pretrain", "V3 4.3"),
    "base": ("context_32k", "V3 4.3"),
    "r1_zero_32k": ("base", "R1 2.1"),
    "r1_zero": ("r1_zero_32k", "R1 2.1"),
    "math_sft": ("base", "V3 5.1"),
    "math_expert": ("math_sft", "V3 5.1"),
    "v3_sft": ("base", "V3 5.1"),
    "v3": ("v3_sft", "V3 5.2"),
    "helpfulness": ("v3_sft", "V3 5.2.1"),
    "safety": ("v3_sft", "V3 5.2.1"),
    "cold_start_sft": ("base", "R1 version 1, 2.3.1"),
    "reasoning_rl": ("cold_start_sft", "R1 figure 2"),
    "sft_2": ("base", "R1 version 1, 2.3.3"),
    "r1": ("sft_2", "R1 figure 2"),
}
"""Stage -> the stage from whose weights it starts, and where a report says so."""


UPDATES = 16
"""Of a rollout."""


def composed(recipe: str) -> Mapping[str, ComposedStage]:
    """Every stage, as a dry run composes it: no weights, no data."""
    config = load("pipeline", [], recipe)
    check_stages(config.pipeline)
    return compose_stages(config, Path("nowhere"))


@pytest.fixture(scope="module")
def stages() -> Mapping[str, ComposedStage]:
    return composed("r1_671b")


@pytest.mark.parametrize(("stage", "key", "value", "section"), PAPERS)
def test_a_stage_has_the_number_of_the_report(
    stages: Mapping[str, ComposedStage], stage: str, key: str, value: Any, section: str
) -> None:
    assert stages[stage].settings[key] == value, f"{section} says {value}"


def test_a_stage_starts_from_the_weights_that_the_report_names(stages: Mapping[str, ComposedStage]) -> None:
    for name, (source, section) in STARTS_FROM.items():
        taken = stages[name].inputs["model"].stage
        assert (taken, stages[name].settings["init.from"]) == (source, f"nowhere/{source}"), section
    students = [name for name in stages if name.startswith(("qwen_", "llama_"))]
    assert len(students) == 6 and all(stages[name].settings["init.from"].startswith("hf:models/") for name in students)


def test_rollouts_make_the_updates_of_the_report(stages: Mapping[str, ComposedStage]) -> None:
    rollouts = {name: stages[name].settings["train.steps"] for name in ("r1_zero_32k", "r1_zero", "r1")}
    assert {name: count * UPDATES for name, count in rollouts.items()} == {
        "r1_zero_32k": 8192,  # R1 2.1: up to step 8.2 thousand
        "r1_zero": 10_400 - 8192,  # R1 2.1: 10,400 in all
        "r1": 1696,  # R1 3.2.2: 1,700
    }
    settings = stages["r1_zero"].settings
    outputs = settings["rl.prompts_per_rollout"] * settings["rl.group_size"]
    assert (outputs, outputs // UPDATES, settings["rl.reference_sync_interval"] * UPDATES) == (8192, 512, 400)


def test_schedules_by_tokens_are_those_of_the_report(stages: Mapping[str, ComposedStage]) -> None:
    """V3 4.2: learning rate, weight of multi-token prediction and bias rate, in trillions of tokens."""
    settings = stages["pretrain"].settings

    def phases(name: str) -> list[tuple[float, float, str]]:
        found = settings[f"train.schedule.{name}"]
        return [(phase["until"] / 1e12, phase["value"], phase["shape"]) for phase in found]

    assert phases("learning_rate_phases") == [
        (10.0, 2.2e-4, "constant"),
        (14.3, 2.2e-5, "cosine"),
        (14.633, 2.2e-5, "constant"),
        (14.8, 7.3e-6, "constant"),
    ]
    assert phases("mtp_weight_phases") == [(10.0, 0.3, "constant"), (14.8, 0.1, "constant")]
    assert phases("bias_rate_phases") == [(14.3, 0.001, "constant"), (14.8, 0.0, "constant")]


def test_the_data_of_the_second_fine_tuning_are_600_and_200_thousand(stages: Mapping[str, ComposedStage]) -> None:
    """R1 B.3.3: reasoning from the reasoning-trained model, general data from V3; both filtered."""
    quotas = {name: stages[f"{name}_data"].settings[f"curate.quotas.{name}"] for name in ("reasoning", "general")}
    assert quotas == {"reasoning": 600_000, "general": 200_000}
    makers = {name: stages[f"{name}_samples"].inputs["model"].stage for name in quotas}
    assert makers == {"reasoning": "reasoning_rl", "general": "v3"}
    assert {output.stage for output in stages["sft_2"].inputs.values()} == {"base", "reasoning_data", "general_data"}


@pytest.mark.parametrize("recipe", ["r1_tiny", "r1_16b", "r1_671b"])
def test_every_stage_composes_without_weights_and_every_model_is_evaluated(
    recipe: str, stages: Mapping[str, ComposedStage]
) -> None:
    found = stages if recipe == "r1_671b" else composed(recipe)
    verbs = {stage.verb for stage in found.values()}
    assert verbs == {"pretrain", "sft", "reward_model", "grpo", "sample", "curate", "evaluate", "convert"}
    evaluated = {
        output.stage for stage in found.values() if stage.verb == "evaluate" for output in stage.inputs.values()
    }
    trained = {name for name, stage in found.items() if stage.verb in ("sft", "grpo")}
    steps_within_a_line = {
        "r1_zero_32k",
        *(name for name in trained if name.split("_")[0] in ("math", "code", "logic", "general")),
    }
    assert trained - steps_within_a_line <= evaluated
    assert found["r1"].model.num_layers == {"r1_671b": 61, "r1_16b": 27, "r1_tiny": 4}[recipe]
