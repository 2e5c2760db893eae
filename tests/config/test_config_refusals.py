"""Broken configurations, each refused by the real command line: one line, exit code 2, no traceback, no torch."""

from __future__ import annotations

import statistics

import pytest

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError
from tests.support.light_forks import run_light

REFUSALS = [
    # misspelt
    ("pretrain model.hiden_size=64", "model.hiden_size=64", "did you mean model.hidden_size?"),
    ("pretrain modle.hidden_size=64", "modle.hidden_size=64", "did you mean model.hidden_size?"),
    ("pretrain hidden_size=64", "hidden_size=64", "did you mean model.hidden_size?"),
    ("pretrain model.moe.num_expert=8", "model.moe.num_expert=8", "did you mean model.moe.num_experts?"),
    (
        "pretrain train.optimizer.learning_rate=1e-3",
        "train.optimizer.learning_rate=0.001",
        "train.schedule.learning_rate",
    ),
    ("grpo rl.group_sise=8", "rl.group_sise=8", "did you mean rl.group_size?"),
    ("grpo init.from_=runs/base", "init.from_=runs/base", "did you mean init.from?"),
    ("pretrain zzz=1", "zzz=1", "the keys there are name, root"),
    # extra
    ("pretrain +x=1", "x=1", "no such key"),
    ("pretrain ++x=1", "x=1", "no such key"),
    ("pretrain +model.x=1", "model.x=1", "no such key"),
    ("pretrain ++train.schedule.x.y=1", "train.schedule.x={'y': 1}", "no such key"),
    ("pretrain model.moe={bogus:4}", "model.moe.bogus=4", "no such key"),
    ("pretrain +model._target_=os.system", "model._target_=os.system", "no such key"),
    ("pretrain _target_=os.system", "_target_=os.system", "no such key"),
    ("pretrain hydra.run.dir=elsewhere", "hydra.run.dir=elsewhere", "no such key"),
    ("pretrain +hydra/launcher=basic", "hydra/launcher=basic", "no such key"),
    ("pipeline pipeline.stages.pretrain.verbs=evaluate", "pipeline.stages.pretrain.verbs=evaluate", "pretrain.verb?"),
    # null, empty, deleted
    ("pretrain model.hidden_size=null", "model.hidden_size=null", "must be a whole number"),
    ("pretrain model=null", "model=null", "must be one of llama3_1_8b"),
    ("pretrain train.optimizer=null", "train.optimizer=null", "must be a section with the keys beta1"),
    ("pretrain name=", "name=", "must be a plain folder name"),
    ("pretrain train.steps=???", "train.steps=???", "must be given a value"),
    ("pretrain ~model.hidden_size", "model.hidden_size=", "cannot be deleted"),
    ("pretrain ~model", "model=", "cannot be deleted"),
    # wrong type
    ("pretrain model.num_layers=true", "model.num_layers=true", "must be a whole number"),
    ("pretrain model.num_layers=4.5", "model.num_layers=4.5", "must be a whole number"),
    ("pretrain model.num_layers=four", "model.num_layers=four", "must be a whole number"),
    ("pretrain train.schedule.learning_rate='0.1'", "train.schedule.learning_rate=0.1", "must be a finite number"),
    ("pretrain train.schedule.learning_rate=nan", "train.schedule.learning_rate=nan", "must be a finite number"),
    ("grpo rl.clip_epsilon=inf", "rl.clip_epsilon=inf", "must be a finite number"),
    ("grpo rl.shuffle_rewards=1", "rl.shuffle_rewards=1", "must be true or false"),
    ("pretrain name=7", "name=7", "must be text (in quotes: '7')"),
    ("pretrain model.moe=3", "model.moe=3", "must be a section"),
    ("pretrain train.steps=[1,2]", "train.steps=[1, 2]", "must be a whole number"),
    ("evaluate evaluate.models=runs/base", "evaluate.models=runs/base", "must be names with values"),
    ("evaluate evaluate.models.base=3", "evaluate.models.base=3", "must be text"),
    ("pipeline pipeline.overrides=train.steps", "pipeline.overrides=train.steps", "must be a list"),
    # out of range
    ("pretrain train.steps=0", "train.steps=0", "must be at least 1"),
    ("pretrain train.schedule.learning_rate=-1", "train.schedule.learning_rate=-1.0", "must lie between"),
    ("grpo reward.format_style=loose", "reward.format_style=loose", "must be one of strict, lenient"),
    ("pretrain platform=gpu", "platform=gpu", "must be one of auto, cpu, cuda"),
    ("pretrain data.source=web", "data.source=web", "must be one of arithmetic, assistant, indexed"),
    (
        "pretrain data=indexed data.indexed.datasets.a.path=b data.indexed.datasets.a.weight=0",
        "data.indexed.datasets.a.weight=0.0",
        "must lie between",
    ),
    # contradictory
    (
        "pretrain data=indexed",
        "data.indexed.datasets={}",
        "must name a dataset: data.indexed.datasets.NAME.path=FOLDER",
    ),
    ("pretrain parallel.tensor=3", "parallel.tensor=3", "must divide model.num_attention_heads=4"),
    ("pretrain parallel.expert=16", "parallel.expert=16", "must divide model.moe.num_experts=8"),
    ("pretrain model.moe.top_k=8", "model.moe.top_k=8", "must be at most 4"),
    ("pretrain train.micro_batch_size=3", "train.micro_batch_size=3", "must divide global_batch_size=16"),
    ("pretrain train.schedule.warmup_steps=9999", "train.schedule.warmup_steps=9999", "must be below train.steps=1800"),
    ("pretrain data.vocab_size=1024", "data.vocab_size=1024", "must be at most model.vocab_size=512"),
    (
        "pretrain train.sequence_length=512",
        "train.sequence_length=512",
        "must be at most model.max_sequence_length=256",
    ),
    ("grpo rollout.max_response_tokens=256", "rollout.max_response_tokens=256", "model.max_sequence_length=256"),
    (
        "grpo rollout.sglang.server.speculative.method=mtp",
        "rollout.weight_sync.include_mtp=false",
        "must be true with sglang.server.speculative.method=mtp",
    ),
    (
        "grpo model.mtp.num_layers=0 rollout.weight_sync.include_mtp=true rollout.sglang.server.speculative.method=mtp",
        "rollout.sglang.server.speculative.method=mtp",
        "needs model.mtp.num_layers of at least 1",
    ),
    ("grpo rl.tokens_per_micro_batch=8", "rl.tokens_per_micro_batch=8", "rollout.max_response_tokens="),
    ("pipeline pipeline.stages.convert.needs=[gone]", "pipeline.stages.convert.needs=gone", "must be one of pretrain"),
    ("pipeline pipeline.stages.convert.verb=report", "pipeline.stages.convert.verb=report", "must be one of pretrain"),
    ("pipeline until=gone", "pipeline.until=gone", "must be one of pretrain"),
    ("pipeline only=convert from=r1_zero", "pipeline.only=convert", "must stand alone"),
    (
        "pipeline pipeline.stages.convert.inputs.policy=pretrain.pairs",
        "pipeline.stages.convert.inputs.policy=pretrain.pairs",
        "must be one of pretrain.checkpoint",
    ),
    ("pretrain model.attention.kind=linear", "model.attention.kind=linear", "must be one of latent, grouped"),
    ("pretrain model=small model.attention.kind=grouped", "model.attention.q_lora_rank=256", "no such key"),
    ("pretrain model=qwen3_0_6b model.attention.q_lora_rank=8", "model.attention.q_lora_rank=8", "no such key"),
    ("pretrain model=tiny_dense model.moe.top_k=2", "model.moe.top_k=2", "must be 0: with num_experts=0"),
    ("pretrain model=tiny_dense model.mtp.num_layers=1", "model.mtp.num_layers=1", "must be 0 with grouped attention"),
    (
        "pretrain model=tiny_qwen3_moe model.moe.num_shared_experts=1",
        "model.moe.num_shared_experts=1",
        "must be 0 with grouped",
    ),
    (
        "pretrain model=tiny_qwen3_moe model.attention.qk_norm=false",
        "model.attention.qk_norm=false",
        "must be true with grouped",
    ),
    (
        "pretrain model=tiny_qwen3_moe model.moe.score_function=sigmoid",
        "model.moe.score_function=sigmoid",
        "as in Qwen3",
    ),
    ("pretrain model=tiny_qwen3_moe model.moe.top_k=1", "model.moe.top_k=1", "at least 2 with softmax_topk"),
    (
        "pretrain model.moe.score_function=softmax_topk",
        "model.moe.score_function=softmax_topk",
        "must be sigmoid or softmax",
    ),
    ("pretrain model=tiny_dense parallel.expert=2", "parallel.expert=2", "the model has no experts"),
    (
        "pretrain model=tiny_dense parallel.tensor=4",
        "parallel.tensor=4",
        "attention.num_key_value_heads=2",
    ),
    ("pretrain model.tied_embeddings=true", "model.tied_embeddings=true", "must be false with latent attention"),
    ("grpo rl.group_size=1", "rl.group_size=1", "must be at least 2"),
    ("grpo reward.domains.accuracy=maths", "reward.domains.accuracy=maths", "must be one of reasoning, helpfulness"),
    ("grpo reward.domains.accurate=reasoning", "reward.domains.accurate=reasoning", "must be of one of accuracy"),
    (
        "grpo data.prompts.min_pass_rate=0.9 data.prompts.max_pass_rate=0.1",
        "data.prompts.min_pass_rate=0.9",
        "must be at most max_pass_rate=0.1",
    ),
    (
        "sft model=tiny_dense routing.sequence_loss_coefficient=1e-4",
        "routing.sequence_loss_coefficient=0.0001",
        "the model is built without a balance loss",
    ),
    ("grpo reward=none", "reward.accuracy=0.0", "at least one reward needs a weight above 0"),
    ("grpo rl=on_policy_distillation", "rl.group_size=1", "must be at least 2"),
    (
        "grpo rl=on_policy_distillation rl.teacher.from=runs/teacher rl.kl_placement=reward",
        "rl.group_size=1",
        "must be at least 2",
    ),
    ("grpo rl=grpo rl.teacher.from=runs/teacher rl.kl_coefficient=0", "rl.kl_coefficient=0.0", "the teacher's weight"),
    ("grpo rl=r1_zero rl.teacher.from=runs/teacher", "rl.reference_sync_interval=25", "never replaces its teacher"),
    (
        "grpo rl=on_policy_distillation rl.teacher.from=runs/teacher rl.kl_estimator=k1",
        "rl.kl_estimator=k1",
        "k1's gradient is 0 on average",
    ),
    ("grpo rl.kl_placement=advantage", "rl.kl_estimator=k3", "must be k1 with kl_placement=advantage"),
    (
        "grpo rl=gspo rl.kl_placement=advantage rl.kl_estimator=k1",
        "rl.objective=gspo",
        "with kl_placement=advantage, which gives each token",
    ),
    (
        "grpo rl=on_policy_distillation rl.teacher.from=runs/teacher rl.filters.truncated=mask",
        "rl.filters.truncated=mask",
        "must be keep with group",
    ),
    ("grpo rl=ppo rl.objective=gspo", "rl.objective=gspo", "with advantage_estimator=critic"),
    ("grpo rl=process reward=steps rl.objective=gspo", "rl.objective=gspo", "with advantage_estimator=process"),
    (
        "grpo rl=process reward=steps rl.shuffle_rewards=true",
        "rl.shuffle_rewards=true",
        "must be false with advantage_estimator",
    ),
    ("grpo rl=ppo rl.group_size=1 rl.filters.truncated=mask", "rl.filters.truncated=mask", "must be keep with group"),
    ("grpo rl=ppo rl.critic.gae_lambda=1.5", "rl.critic.gae_lambda=1.5", "must lie between"),
    (
        "grpo rl=ppo rollout.placement=colocated",
        "rollout.placement=colocated",
        "must be separate with rl.advantage_estimator",
    ),
    ("grpo rollout.placement=apart", "rollout.placement=apart", "must be one of separate, colocated"),
    (
        "grpo rollout.weight_sync.delta=true rollout.weight_sync.method=disk",
        "rollout.weight_sync.method=disk",
        "must be group with weight_sync.delta=true",
    ),
    (
        "grpo rollout.weight_sync.delta=true rollout.placement=colocated",
        "rollout.placement=colocated",
        "must be separate with weight_sync.delta=true",
    ),
    (
        "grpo rollout.weight_sync.delta=true rollout.sglang.server.quantization=fp8",
        "rollout.sglang.server.quantization=fp8",
        "must be none with weight_sync.delta=true",
    ),
    (
        "grpo rollout.weight_sync.delta=true rollout.sglang.addresses=[http://a:1]",
        "rollout.weight_sync.delta=true",
        "must be false with servers that are started elsewhere",
    ),
    (
        "grpo rollout.placement=colocated rollout.max_staleness=1",
        "rollout.max_staleness=1",
        "must be 0 with placement=colocated",
    ),
    (
        "grpo rollout.placement=colocated rollout.sglang.addresses=['http://a:1']",
        "rollout.sglang.addresses=['http://a:1']",
        "must be empty with placement=colocated",
    ),
    (
        "grpo rollout.placement=colocated rollout.weight_sync.pause_mode=abort",
        "rollout.weight_sync.pause_mode=abort",
        "must be finish with",
    ),
    ("grpo rollout=local rollout.placement=colocated", "rollout.engine=local", "must be sglang with"),
    ("grpo reward.helpfulness=1", "reward.helpfulness=1.0", "helpfulness_model: both are given, or neither"),
    ("grpo reward.judge_config.url=http://a:1/v1", "reward.judge=0.0", "judge_config.url: both are given, or neither"),
    (
        "grpo rollout.weight_sync.method=ipc",
        "rollout.weight_sync.method=ipc",
        "must be group or disk with placement=separate",
    ),
    # choices, grammar, files, interpolation
    ("pretrain model=huge", "model=huge", "must be one of llama3_1_8b"),
    ("pretrain +model=huge", "model=huge", "must be one of llama3_1_8b"),
    ("pretrain model=[tiny]", "model=['tiny']", "must be one of llama3_1_8b"),
    ("pretrain model@rl=tiny", "model@rl=tiny", "no such key"),
    ("pretrain train.steps", "train.steps=", "must be key=value"),
    ("pretrain name=a(b", "name=a(b", "must be key=value"),
    ("pretrain =3", "=3", "no such key"),
    ("pretrain train.steps=1,2", "train.steps=1,2", "must be one value"),
    ("pretrain name=${nowhere}", "name=${nowhere}", "nowhere"),
    ("pretrain name=${oc.env:MEGATRON_R1_UNSET}", "name=${oc.env:MEGATRON_R1_UNSET}", "MEGATRON_R1_UNSET"),
    ("pretrain --config-name absent", "--config-name=absent", "must be one of average, check, context_128k"),
    ("pretrain --config-name=model/tiny", "--config-name=model/tiny", "must be one of average, check, context_128k"),
    ("pretrian", "VERB=pretrian", "must be one of pretrain"),
    ("chek pretrain", "VERB=chek", "did you mean check?"),
    ("check pretain", "VERB=pretain", "did you mean pretrain?"),
    ("submit pipeline=r1_16b", "VERB=pipeline=r1_16b", "did you mean pipeline?"),
    ("pretrain --cfg hydra", "--cfg=hydra", "must be job"),
    ("pretrain --multirun", "option=--multirun", "must be one of --config-name"),
    # nothing to start from
    *((verb, "init.from=", f"{verb} needs a model") for verb in ("sft", "grpo", "reward_model", "dpo", "sample")),
]
LIMIT = 5.0
"""Times the import of Hydra; with torch imported it would be 8 or more."""
STARTED_AFRESH = REFUSALS[::14]
"""Those whose process imports all that it needs itself, so that their time is a user's."""


@pytest.mark.parametrize(("command", "key_and_value", "allowed"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_broken_config_is_refused_in_one_line(command, key_and_value, allowed):
    result = run_light(*command.split())
    assert result.stderr.startswith(f"megatron-r1: {key_and_value}: ")
    assert allowed in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert (result.returncode, result.stdout) == (2, "")


def test_refusals_take_little_longer_than_to_import_hydra(run_command, hydra_seconds):
    assert len(REFUSALS) >= 50
    results = [run_command(*command.split()) for command, _, _ in STARTED_AFRESH]
    for result, (command, key_and_value, _) in zip(results, STARTED_AFRESH, strict=True):
        assert result.stderr.startswith(f"megatron-r1: {key_and_value}: ") and result.status == 2, command
        assert result.processor_seconds < LIMIT * hydra_seconds, command
    seconds = statistics.median(result.processor_seconds for result in results)
    print(f"a refusal takes {seconds:.2f} s of a core, {seconds / hydra_seconds:.2f} times the import of Hydra")
    assert seconds < 0.8 * LIMIT * hydra_seconds


def test_a_critic_of_tied_embeddings_on_two_stages_is_refused():
    config = load("grpo", ["rl=ppo", "model=tiny_dense", "parallel.pipeline=2"])
    assert config.model.tied_embeddings
    with pytest.raises(ConfigError, match="parallel.pipeline=2: must be 1 with rl.advantage_estimator=critic"):
        check_layout(config, "grpo", ranks=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl=process"], "reward.steps=0.0: must be above 0 with rl.advantage_estimator=process"),
        (["reward=steps"], "reward.steps=0.5: must be 0 with rl.advantage_estimator=group"),
    ],
)
def test_rewards_of_steps_and_advantages_of_steps_need_each_other(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(load("grpo", overrides), "grpo", ranks=1)
    for use in ("rl=process", "rl=ppo"):
        check_layout(load("grpo", ["reward=steps", use]), "grpo", ranks=1)


def test_only_rank_zero_prints_the_error(run_command):
    assert run_command("pretrain", "x=1", RANK="0", WORLD_SIZE="4").stderr.count("\n") == 1
    silent = run_command("pretrain", "x=1", RANK="3", WORLD_SIZE="4")
    assert (silent.status, silent.stderr) == (2, "")


def test_refusal_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_light("pretrain", "x=1").returncode == 2
    assert list(tmp_path.iterdir()) == []
