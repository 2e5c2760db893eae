"""Every key of every verb is read by its code or refused; what verbs declare is held against the code."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.describe import all_keys
from megatron_r1.config.keys import check_overrides, check_recipe, only_read, reads
from megatron_r1.config.load import load
from megatron_r1.config.recipes import recipes
from megatron_r1.config.verbs import GENERAL, VERBS
from megatron_r1.errors import ConfigError
from tests.support.config_reads import keys_read_by

KEYS = sorted({key.path for key in all_keys() if not key.section and "NAME" not in key.path and "[]" not in key.path})
RECIPES = {verb: entry.recipe for verb, entry in VERBS.items()}
VERB_OF = {
    **dict.fromkeys(("context_32k", "context_128k", "context_tiny", "pretrain_v3", "pretrain_16b"), "pretrain"),
    "sft_v3": "sft", "sft_r1": "sft", "reward_safety": "reward_model", "reward_safety_r1": "reward_model",
    "reward_helpfulness_r1": "reward_model", "smollm": "pipeline", "sample_r1": "sample", "sft_distill_r1": "sft",
    **dict.fromkeys(("gsm8k_qwen", "r1_16b", "r1_671b", "r1_tiny"), "pipeline"),
    **dict.fromkeys(("rl_zero_r1", "rl_reasoning_r1", "rl_scenarios_r1", "rl_v3"), "grpo"),
    **{recipe: verb for verb, recipe in RECIPES.items()},
}  # fmt: skip

READ_ELSEWHERE = {
    "name": "by open_run_folder, which report and doctor do not need; every recipe names itself",
    "root": "as name",
    "seed": "pipeline hands it to its stages",
    "threads": "of all ranks, by process_groups",
    "model.attention.kind": "by the schema, which chooses the section by it",
    "performance.recompute_modules": "by recomputed_modules",
    "train.schedule.batch_ramp.start": "by TrainConfig.batch_sizes",
    "train.schedule.batch_ramp.increment": "by TrainConfig.batch_sizes",
}
"""Key -> where it is read, where the search does not see it."""

KERNELS = ("performance.gradient_accumulation_fusion", "performance.moe_token_dispatcher_type")
"""Read beside the platform's preparation, by `refuse_missing_kernels`, which training alone calls."""
IMPORTED_ONLY = {
    # Modules that several verbs import read more than each verb's own path through them.
    "pretrain": ("sft.", "data.prompts.", "routing."),
    "sft": ("model.moe.", "model.mtp.loss_coefficient", "train.schedule.", "data.", "train.balance_window"),
    "grpo": ("model.moe.", "model.mtp.loss_coefficient", "train.schedule.", "data.", "sft.", "dpo.", "reward_model.",
             "train.global", "watch."),
    "reward_model": ("model.moe.", "model.mtp.loss_coefficient", "train.schedule.", "data.", "dpo.", "sft."),
    "dpo": (
        "model.moe.", "model.mtp.loss_coefficient", "train.schedule.", "data.", "reward_model.", "rollout.", "sft.",
        "rl.kl_estimator", "rl.old_logprobs_from",
    ),
    "evaluate": ("model.", "fp8.", "parallel.", "performance.", "data.", "reward.", "sft.", "rollout.temperature"),
    "curate": ("reward.", "model.", "data.", "rollout.", "sft.", *KERNELS),
    "sample": ("model.", "fp8.", "parallel.", "performance.", "data.", "sft."),
    "diagnose": ("model.", "fp8.", "performance.", "init.weights", "rl.kl_estimator", "rl.old_logprobs_from"),
    "convert": ("parallel.", *KERNELS),
    "average": ("init.", "model.", "parallel.", *KERNELS),
    "check": ("",),  # it reads what the verb reads whose command it checks
    "pipeline": ("init.", "model.", *KERNELS),
    "report": KERNELS,
    "doctor": (*KERNELS, "reward.sandbox."),
    "submit": ("",),  # as check, for the verb that the job runs
    "plan": ("",),  # as check, for the verb whose command it plans
    "serve": ("",),  # as check, for the verb whose servers it runs
}  # fmt: skip
"""Verb -> keys that modules in its import closure read, and the verb does not: it takes the model's shape from the
checkpoint, balances no routers by the keys of pre-training, or calls another function of that module."""


@cache
def found_in_code(verb: str) -> frozenset[str]:
    return keys_read_by(verb)


def is_found(key: str, verb: str) -> bool:
    return key in found_in_code(verb) or any(found.startswith(f"{key}.") for found in found_in_code(verb))


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_is_read_or_refused(verb: str) -> None:
    """Both by what the verb declares, and by the command line's own check."""
    for key in KEYS:
        if reads(verb, key):
            check_overrides(verb, [f"{key}=1"])
        else:
            with pytest.raises(ConfigError) as refused:
                check_overrides(verb, [f"{key}=1"])
            assert refused.value.key == key and f"{verb} never reads" in refused.value.allowed


@pytest.mark.parametrize("verb", VERBS)
def test_keys_that_a_verb_accepts_are_read_by_its_code(verb: str) -> None:
    """No key is accepted that nothing reads."""
    read_keys = [key for key in KEYS if reads(verb, key) and key not in READ_ELSEWHERE]
    assert [key for key in read_keys if not is_found(key, verb)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_keys_that_a_verb_refuses_are_not_read_by_its_code(verb: str) -> None:
    """A key that the code reads is refused only where a reason stands above."""
    refused = [key for key in KEYS if not reads(verb, key) and is_found(key, verb)]
    assert [key for key in refused if not key.startswith(IMPORTED_ONLY.get(verb, ("-",)))] == []


def test_the_search_finds_reads() -> None:
    assert {"rl.group_size", "train.optimizer.beta1"} <= found_in_code("grpo")
    assert not {"rl.group_size", "train.sequence_length"} & found_in_code("convert")
    assert "train.micro_batch_size" not in found_in_code("grpo")


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_sets_only_what_its_verb_reads(recipe: str) -> None:
    check_recipe(VERB_OF[recipe], recipe)


def test_a_recipe_of_another_verb_is_refused() -> None:
    with pytest.raises(ConfigError, match="reward.format_style"):
        check_recipe("pretrain", "r1_zero")


@pytest.mark.parametrize(
    ("verb", "override", "key"),
    [
        ("grpo", "train.micro_batch_size=4", "train.micro_batch_size"),
        ("grpo", "++train.sequence_length=4", "train.sequence_length"),
        ("grpo", "train={global_batch_size:4}", "train.global_batch_size"),
        ("grpo", "train.schedule.batch_ramp.tokens=10", "train.schedule.batch_ramp.tokens"),
        ("sft", "model.moe.bias_update_rate=0", "model.moe.bias_update_rate"),
        ("grpo", "watch.max_rewinds=1", "watch.max_rewinds"),
        ("pretrain", "reward=dapo", "reward"),
        ("pipeline", "train.steps=4", "train.steps"),
    ],
)
def test_an_override_without_effect_is_refused(verb: str, override: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_overrides(verb, [override])
    assert refused.value.key == key


def test_sizes_that_grpo_never_reads_are_not_checked_for_it() -> None:
    overrides = ["model.max_sequence_length=64", "rollout.max_response_tokens=32", "parallel.tensor=2"]
    config = load("grpo", [*overrides, "init.from=base"])
    assert config.train.sequence_length > config.model.max_sequence_length
    check_layout(config, "grpo", 2)


def test_stages_of_a_recipe_get_what_they_read() -> None:
    common = ["threads=1", "rollout=local", "rl.group_size=4", "track.wandb=offline"]
    assert only_read("grpo", common) == common
    assert only_read("pretrain", common) == ["threads=1", "track.wandb=offline"]
    assert only_read("report", common) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("pipeline.overrides=['dpo.beta=1']", "pipeline.overrides"),
        ("pipeline.stages.pretrain.overrides=['rl.group_size=4']", "pipeline.stages.pretrain.overrides"),
    ],
)
def test_an_override_that_no_stage_reads_is_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_layout(load("pipeline", [override]), "pipeline", 1)
    assert refused.value.key == key


def test_general_keys_are_read_by_every_verb() -> None:
    assert all(reads(verb, key) for verb in VERBS for key in GENERAL)
