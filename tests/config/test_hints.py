"""Spellings that people bring from Megatron, TRL, verl, OpenRLHF and Hugging Face: never accepted, always answered."""

from __future__ import annotations

import pytest

from megatron_r1.config.hints import HINTS
from megatron_r1.config.load import load
from megatron_r1.config.schema import exists
from megatron_r1.errors import ConfigError

SPELLINGS = {
    # Megatron-LM
    "train_iters": "train.steps",
    "tensor_model_parallel_size": "parallel.tensor",
    "parallel.tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "expert_model_parallel_size": "parallel.expert",
    "context_parallel_size": "parallel.context",
    "parallel.tp": "parallel.tensor",
    "parallel.pp": "parallel.pipeline",
    "parallel.ep": "parallel.expert",
    "parallel.cp": "parallel.context",
    "train.seq_length": "train.sequence_length",
    "train.clip_grad": "train.optimizer.max_grad_norm",
    "train.min_lr": "train.schedule.min_learning_rate",
    "train.lr_warmup_iters": "train.schedule.warmup_steps",
    "train.save-interval": "train.save_interval",
    "model.num_query_groups": "model.attention.num_key_value_heads",
    "model.moe_router_topk": "model.moe.top_k",
    "model.init_method_std": "model.init_std",
    "rampup_batch_size": "train.schedule.batch_ramp",
    "moe_token_dispatcher_type": "performance.moe_token_dispatcher_type",
    # TRL and Hugging Face
    "lr": "train.schedule.learning_rate",
    "train.lr": "train.schedule.learning_rate",
    "train.learning_rate": "train.schedule.learning_rate",
    "rl.beta": "rl.kl_coefficient",
    "rl.num_generations": "rl.group_size",
    "rl.num_iterations": "rl.epochs_per_rollout",
    "rl.loss_type": "rl.loss_aggregation",
    "rl.epsilon_high": "rl.clip_epsilon_high",
    "rl.scale_rewards": "rl.advantage_std",
    "rl.mask_truncated_completions": "rl.filters.truncated",
    "max_completion_length": "rollout.max_response_tokens",
    "train.max_steps": "train.steps",
    "train.save_steps": "train.save_interval",
    "train.logging_steps": "train.log_interval",
    "train.warmup_ratio": "train.schedule.warmup_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "lr_scheduler_type": "train.schedule.lr_decay_style",
    "num_train_epochs": "sft.epochs",
    "reward_funcs": "reward.custom_function",
    "model_name_or_path": "init.from",
    "report_to": "track.wandb",
    "model.num_hidden_layers": "model.num_layers",
    "model.rms_norm_eps": "model.norm_epsilon",
    "model.torch_dtype": "model.dtype",
    "gradient_checkpointing": "performance.recompute_modules",
    # verl
    "actor.optim.lr": "train.schedule.learning_rate",
    "critic.optim.lr": "rl.critic.learning_rate",
    "algorithm.adv_estimator": "rl.advantage_estimator",
    "algorithm.kl_ctrl.kl_coef": "rl.kl_coefficient",
    "actor_rollout_ref.actor.clip_ratio": "rl.clip_epsilon",
    "actor_rollout_ref.actor.loss_agg_mode": "rl.loss_aggregation",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "rl.updates_per_rollout",
    "actor_rollout_ref.actor.entropy_coeff": "rl.entropy_coefficient",
    "actor_rollout_ref.rollout.n": "rl.group_size",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "rollout.sglang.server.memory_fraction",
    "data.max_response_length": "rollout.max_response_tokens",
    "trainer.total_training_steps": "train.steps",
    "trainer.experiment_name": "name",
    "algorithm.lam": "rl.critic.gae_lambda",
    # OpenRLHF, slime, SGLang and others
    "n_samples_per_prompt": "rl.group_size",
    "eps_clip": "rl.clip_epsilon",
    "init_kl_coef": "rl.kl_coefficient",
    "rollout.max_new_tokens": "rollout.max_response_tokens",
    "rollout.max_off_policy_steps": "rollout.max_staleness",
    "rollout.mem_fraction_static": "rollout.sglang.server.memory_fraction",
}
"""Spelling -> the key that is meant."""


@pytest.mark.parametrize(("spelling", "key"), SPELLINGS.items())
def test_refusal_of_a_foreign_spelling_names_the_key(spelling: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("grpo", [f"{spelling}=1"])
    assert refused.value.key == spelling
    assert refused.value.allowed == f"no such key; did you mean {key}?"


def test_the_table_is_long_and_names_keys_that_exist() -> None:
    assert len(SPELLINGS) >= 60 and len(HINTS) >= 100
    assert [key for key in HINTS.values() if not exists(key)] == []


def test_no_spelling_is_a_key_of_its_own() -> None:
    assert [spelling for spelling in SPELLINGS if exists(spelling)] == []
