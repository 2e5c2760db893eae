"""grpo: reinforcement learning (R1-Zero when it starts from a base model), by groups of answers or with a critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.model.chunks import in_multi_token_layer
from megatron_r1.model.replay import RoutingReplay
from megatron_r1.model.shards import Shard
from megatron_r1.parallel import comm
from megatron_r1.parallel.launcher import is_rank_zero
from megatron_r1.preference.scorer import RewardModelScorer
from megatron_r1.rewards.rubric_builder import rule_scorer
from megatron_r1.rewards.score import Weighted
from megatron_r1.rl.advantages.critic import Critic, CriticAdvantages
from megatron_r1.rl.advantages.critic_setup import critic_of
from megatron_r1.rl.generation.async_rollouts import AsyncRollouts, RolloutSource
from megatron_r1.rl.generation.reward_service import CollectiveRewardService
from megatron_r1.rl.generation.rollouts import Rollouts
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rl.placement import Colocated, Separate
from megatron_r1.rl.policy.reference import SAVED, ReferencePolicy
from megatron_r1.rollout.engine import RolloutEngine
from megatron_r1.rollout.factory import training_sglang_engine
from megatron_r1.rollout.in_process import LocalEngine
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.routed_experts import RoutedLayers
from megatron_r1.runs.initial_weights import Weights, initial_model
from megatron_r1.runs.prompts import keep, prompt_formatter, prompts_of_file, training_prompts
from megatron_r1.runs.training_run import TrainingRun, finish_run, training_run
from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.loop import train
from megatron_r1.train.offload import TrainerMemory
from megatron_r1.train.state import TrainState

SHOWN = (
    "rollout/reward",
    "rollout/accuracy",
    "rollout/format",
    "rollout/response_length",
    "policy/kl",
    "policy/entropy",
    "perf/rollout_seconds",
    "perf/train_seconds",
)


def run(config: RunConfig) -> None:
    """Reinforce a model, or go on where its run stopped."""
    weights, tokenizer = initial_model(config)
    formatter = prompt_formatter(config, tokenizer)
    questions = prompts_of_file(config, formatter)
    # Answers predict one token at a time: the multi-token layers are carried through untouched.
    with training_run(config, tokenizer, weights, trainable=lambda name: not in_multi_token_layer(name)) as run:
        if run.state.step >= config.train.steps:
            finish_run(run, run.state)
            return
        joint, replay, placement = reward_service(run), replay_of(run), placement_of(run)
        scorer = rule_scorer(config.reward, lambda text: len(tokenizer.encode(text)), joint.rewards if joint else ())
        learning = learning_of(run, weights, replay)
        prompts = config.rl.prompts_per_rollout
        with rollout_engine(run, weights, replay, placement) as engine, ExitStack() as stack:
            rollouts: RolloutSource | None = None
            hooks: Hook = run.hooks(SHOWN, f"grpo {config.name}", extra_shards=learning.saved)
            if is_rank_zero():
                keep(questions, run.folder)
                journal = Journal(run.folder / "rollouts")
                hooks = Hooks([hooks, PruneJournal(journal, config.train)])
                asked = training_prompts(config, questions)
                routed = routed_layers(config.model) if replay else None
                rollouts = Rollouts(
                    asked, engine, formatter, journal, scorer, config.rollout, config.rl, config.seed, routed
                )
                if config.rollout.max_staleness:
                    rollouts = stack.enter_context(ahead_of(rollouts, config, engine.abandon, joint))
            received = joint.received if joint else comm.receive_broadcast
            step = reinforcement_step(rollouts, learning.learner, engine.update_weights, prompts, placement, received)
            state = train(run.state, step, hooks, config.train.steps)
        finish_run(run, state)


@dataclass(frozen=True)
class Learning:
    """What learns from rollouts, and what a checkpoint holds for it beside the policy."""

    learner: Learner
    reference: ReferencePolicy | None
    critic: Critic | None

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Kind and shard of what this rank speaks for."""
        for part in (self.reference, self.critic):
            yield from part.saved() if part else ()


def learning_of(run: TrainingRun, weights: Weights, replay: RoutingReplay | None) -> Learning:
    """The learner with the reference and the critic that the configuration asks for, as a checkpoint left them."""
    rl = run.config.rl
    reference = ReferencePolicy(run.model, run.saved(SAVED)) if rl.kl_coefficient else None
    critic = critic_of(run, weights) if rl.advantage_estimator == "critic" else None
    advantages = CriticAdvantages(critic, rl.critic) if critic else None
    device, pad = run.platform.device, run.tokenizer.pad
    learner = Learner(run.config, run.model, run.optimizer, reference, pad, device, replay, advantages)
    return Learning(learner, reference, critic)


def replay_of(run: TrainingRun) -> RoutingReplay | None:
    """Lets routers take the experts that the engine took, where that is asked for."""
    config = run.config
    return RoutingReplay(run.model, config.model.moe.first_dense_layers) if config.rl.routing_replay else None


def routed_layers(model: ModelConfig) -> RoutedLayers:
    """The layers whose experts the engine is to tell."""
    return RoutedLayers(model.num_layers, model.moe.first_dense_layers, model.moe.top_k)


def placement_of(run: TrainingRun) -> Separate | Colocated:
    """Whose turn it is with the devices."""
    colocated = run.config.rollout.placement == "colocated"
    return Colocated(TrainerMemory(run.model, run.optimizer)) if colocated else Separate()


def reward_service(run: TrainingRun) -> CollectiveRewardService | None:
    """The configured reward models, at work beside the policy on all ranks."""
    reward, parallel = run.config.reward, run.config.parallel

    def weighted(name: str, source: str) -> Weighted:
        scorer = RewardModelScorer(source, parallel, run.platform, f"reward.{name}_model", name)
        return Weighted(getattr(reward, name), scorer)

    models = [weighted(name, source) for name, source in reward.models.items()]
    return CollectiveRewardService(models) if models else None


def ahead_of(
    rollouts: RolloutSource, config: RunConfig, abandon: Callable[[], None], joint: CollectiveRewardService | None
) -> AsyncRollouts:
    """The same rollouts, taken while the trainer learns; reward models score when it waits for one."""
    ahead, prompts, last = config.rollout.max_staleness, config.rl.prompts_per_rollout, config.train.steps
    if joint is None:
        return AsyncRollouts(rollouts, ahead, prompts, last, abandon)

    def abandon_both() -> None:
        abandon()
        joint.close()

    return AsyncRollouts(rollouts, ahead, prompts, last, abandon_both, joint.result)


class PruneJournal(Hook):
    """Drops rollouts that no checkpoint could need again."""

    def __init__(self, journal: Journal, train):
        self._journal = journal
        self._horizon = train.save_interval * (train.save_total_limit + 1)

    def after_step(self, state: TrainState, row: dict) -> None:
        self._journal.prune(before_step=state.step - self._horizon)


@contextmanager
def rollout_engine(
    run: TrainingRun, weights: Weights, replay: RoutingReplay | None, placement: Separate | Colocated
) -> Iterator[RolloutEngine]:
    """The configured engine; each step sends it the trainer's weights before it samples."""
    rollout = run.config.rollout
    if rollout.engine == "local":
        # Every rank has the whole model; rank 0 alone samples.
        yield LocalEngine(run.model, rollout.local_batch_size, run.tokenizer.pad, replay)
        return
    if isinstance(placement, Colocated) and run.platform.name == "cuda" and not rollout.sglang.server.memory_saver:
        allowed = "must be true with rollout.placement=colocated on a GPU: without it servers keep their memory"
        raise ConfigError("rollout.sglang.server.memory_saver", False, allowed)
    with training_sglang_engine(
        rollout,
        run.config.model,
        run.model,
        weights.tokenizer_folder,
        run.folder / "logs",
        run.platform.name,
        placement.starting_servers,
    ) as engine:
        if isinstance(placement, Colocated):
            placement.engine = engine.sglang
        yield engine
