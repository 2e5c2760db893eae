"""grpo: reinforcement learning, group-relative or with a critic (R1-Zero when it starts from a base model)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.store import CheckpointStore, step_folders
from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.data.prompts.mixture import StepPositions, prompt_files, training_prompts
from megatron_r1.errors import ConfigError
from megatron_r1.model.replay import NoReplay, Replay, RoutingReplay
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.preference.scorer import RewardModelScorer
from megatron_r1.rewards.accuracy import truth_problems
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rewards.score import Scorer, Weighted
from megatron_r1.rl.advantages.critic_setup import build_critic
from megatron_r1.rl.generation.async_rollouts import AsyncRollouts, RolloutSource
from megatron_r1.rl.generation.reward_service import CollectiveRewardService, NoRewardModels, RewardService
from megatron_r1.rl.generation.rollouts import REFILLS, Rollouts
from megatron_r1.rl.generation.sample_tables import ShowSamples, show_none, show_some
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rl.placement import Colocated, Placement, Separate
from megatron_r1.rl.policy.reference import SAVED, FixedPolicy, ReferencePolicy
from megatron_r1.rl.policy.teacher import TeacherPolicy, find_policy_teacher
from megatron_r1.rollout.engine import RolloutEngine, WeightSync
from megatron_r1.rollout.factory import training_sglang_engine
from megatron_r1.rollout.in_process import LocalEngine
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.routed_experts import RoutedLayers
from megatron_r1.runs.initial_weights import InitialModel, initial_model
from megatron_r1.runs.post_training import begin_post_training, trained_weights
from megatron_r1.runs.prompts import pin_prompts, prompt_formatter
from megatron_r1.runs.retention import needs_rollouts_since
from megatron_r1.runs.teacher import load_teacher
from megatron_r1.runs.training_run import TrainingRun, finish_run, training_run
from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.loop import train
from megatron_r1.train.offload import TrainerMemory
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

SHOWN = (
    "rollout/reward",
    "rollout/accuracy",
    "rollout/format",
    "rollout/response_length",
    "policy/kl",
    "policy/entropy",
)
"""Metrics on the terminal."""
JOURNAL = "rollouts"
"""Folder of the run with the rollouts of each step."""


def run(config: RunConfig) -> None:
    """Train a policy by reinforcement learning, or resume where its run stopped."""
    initial, tokenizer = initial_model(config)
    teacher = find_policy_teacher(config, tokenizer)
    readers = (config.model, teacher.model) if teacher else (config.model,)
    formatter = prompt_formatter(config, tokenizer, min(model.max_sequence_length for model in readers))
    tokenizer = formatter.tokenizer
    truths = partial(truth_problems, config.reward) if config.reward.reads_answers and is_rank_zero() else None
    files = {
        name: read_prompts(source, formatter.check, truth_problems=truths)
        for name, source in prompt_files(config.data).items()
    }
    # The engine samples one token at a time: multi-token layers are not trained.
    with training_run(config, tokenizer, initial, trained_weights(config)) as run:
        begin_post_training(run)
        if run.state.step >= config.train.steps:
            finish_run(run, run.state)
            return
        service, replay, placement = build_reward_service(run), build_replay(run), build_placement(run)
        count_tokens = lambda text: len(tokenizer.encode(text))  # noqa: E731
        scorer = build_rubric(config.reward, count_tokens, service.rewards, formatter.instructions)
        learner = build_learner(run, initial, replay, teacher)
        with (
            rollout_engine(run, initial.tokenizer_folder, replay, placement) as (engine, sync),
            rollout_source(run, engine, files, formatter, scorer, service) as rollouts,
        ):
            prompts = config.rl.prompts_per_rollout
            health = engine.health if engine else dict
            hooks, show = build_hooks(run, learner), build_sample_tables(run)
            step = reinforcement_step(rollouts, learner, sync.push, prompts, placement, service, health, show)
            state = train(run.state, step, hooks, config.train.steps)
        finish_run(run, state)


def build_reward_service(run: TrainingRun) -> RewardService:
    """The configured reward models, sharded over all ranks beside the policy."""
    reward, parallel = run.config.reward, run.config.parallel

    def weighted(name: str, source: str) -> Weighted:
        scorer = RewardModelScorer(source, parallel, run.platform, f"reward.{name}_model", name)
        return Weighted(getattr(reward, name), scorer)

    models = [weighted(name, source) for name, source in reward.models.items()]
    return CollectiveRewardService(models) if models else NoRewardModels()


def build_replay(run: TrainingRun) -> Replay:
    """Routing replay, where it is configured."""
    config = run.config
    return RoutingReplay(run.model, config.model.moe.first_dense_layers) if config.rl.routing_replay else NoReplay()


def build_placement(run: TrainingRun) -> Placement:
    """How engine and trainer share the devices' memory.

    Raises:
        ConfigError: colocated servers on a GPU could not release their memory.
    """
    rollout = run.config.rollout
    if rollout.placement != "colocated":
        return Separate()
    if run.platform.name == "cuda" and not rollout.sglang.server.memory_saver:
        allowed = "must be true with rollout.placement=colocated on a GPU: without it servers cannot release memory"
        raise ConfigError("rollout.sglang.server.memory_saver", False, allowed)
    return Colocated(TrainerMemory(run.model, run.optimizer))


def build_learner(
    run: TrainingRun, initial: InitialModel, replay: Replay, teacher: InitialModel | None = None
) -> Learner:
    """The learner with the configured reference or teacher and critic, restored where the run resumes."""
    rl = run.config.rl
    reference: FixedPolicy | None = None
    if teacher:
        reference = TeacherPolicy(load_teacher(run, teacher), run.config.model.vocab_size)
    elif rl.kl_coefficient:
        reference = ReferencePolicy(run.model, run.saved(SAVED))
    critic = build_critic(run, initial) if rl.advantage_estimator == "critic" else None
    pad, device = run.tokenizer.pad, run.platform.device
    return Learner(run.config, run.model, run.optimizer, reference, pad, device, replay, critic)


@contextmanager
def rollout_engine(
    run: TrainingRun, tokenizer_folder: Path, replay: Replay, placement: Placement
) -> Iterator[tuple[RolloutEngine | None, WeightSync]]:
    """Collective: the configured engine, and the sync by which each step sends it the trainer's weights."""
    rollout = run.config.rollout
    if rollout.engine == "local":
        if run.config.fp8.enabled and run.platform.transformer_engine:
            allowed = "must be sglang with fp8 on Transformer Engine: step by step it would multiply in 16 bits"
            raise ConfigError("rollout.engine", "local", allowed)
        # Every rank has the whole model; only rank 0 samples from it.
        local = LocalEngine(run.model, rollout.local_batch_size, run.tokenizer.pad, replay)
        yield local, local
        return
    with training_sglang_engine(
        rollout,
        run.config.model,
        run.model,
        tokenizer_folder,
        run.folder / "logs",
        run.platform.name,
        placement,
    ) as engine_and_sync:
        yield engine_and_sync


@contextmanager
def rollout_source(
    run: TrainingRun,
    engine: RolloutEngine | None,
    files: Mapping[str, PromptFile],
    formatter: PromptFormatter,
    scorer: Scorer,
    service: RewardService,
) -> Iterator[RolloutSource | None]:
    """The rollouts of the run, on rank 0; None on the other ranks.

    Args:
        files: the prompts that are read from files, by source.
    """
    if engine is None or not is_rank_zero():
        yield None
        return
    pin_prompts([*files.values()], run.folder)
    config, rl = run.config, run.config.rl
    positions = StepPositions(rl.prompts_per_rollout, REFILLS, rl.filters.max_resample_rounds)
    prompts = training_prompts(config.data, files, positions, config.train.steps)
    journal, moe = Journal(run.folder / JOURNAL), config.model.moe
    if removed := journal.remove_of_other_weights(run.state.step):
        logger.warning("rollouts of steps %s were sampled by weights that the run has lost: it samples anew", removed)
    layers = RoutedLayers(config.model.num_layers, moe.first_dense_layers, moe.top_k)
    routed = layers if config.rl.routing_replay else None
    rollouts = Rollouts(prompts, engine, formatter, journal, scorer, config.rollout, config.rl, config.seed, routed)
    if not config.rollout.max_staleness:
        yield rollouts
        return
    limits = config.rollout.max_staleness, config.rl.prompts_per_rollout, config.train.steps
    with AsyncRollouts(rollouts, *limits, engine.abandon, service) as ahead:
        yield ahead


def build_hooks(run: TrainingRun, learner: Learner) -> Hook:
    """The run's hooks; on rank 0 also the one that prunes the journal."""
    hooks = run.hooks(SHOWN, "grpo", extra_shards=learner.saved)
    if not is_rank_zero():
        return hooks
    return Hooks([hooks, PruneJournal(Journal(run.folder / JOURNAL), run.store)])


def build_sample_tables(run: TrainingRun) -> ShowSamples:
    """Tables of sampled responses, on the rank that records, where wandb shows them; after the hooks."""
    rl, tracker = run.config.rl, run.tracker
    if not rl.sample_table_interval or tracker is None or not tracker.in_wandb:
        return show_none
    return show_some(rl, run.tokenizer, tracker.add_samples)


class PruneJournal(Hook):
    """Deletes rollouts that no checkpoint can need again from which the run goes on."""

    def __init__(self, journal: Journal, store: CheckpointStore):
        self._journal, self._store = journal, store
        self._checkpoints: list[tuple[int, Path]] = []

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if (now := step_folders(self._store.folder)) != self._checkpoints:
            self._checkpoints = now
            self._journal.prune(before_step=needs_rollouts_since(now, self._store.retention) + 1)
